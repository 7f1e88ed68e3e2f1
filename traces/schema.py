"""What a trace holds: four kinds of records on disk, and the typed view of a policy call that trainers read.

    episode_start   written before anything happens; without an end beside it the episode failed
    span            one finished step: policy call, tool call
    episode_end     how it ended, and how many spans there must be
    annotation      what was said about it later: rewards, advantages, remarks; the spans themselves never change

Of a call's prompt only the ids after ``prefix_length`` are stored: what the same stream's call before it had, prompt and sampled ids,
stands there already. So an episode of T turns takes O(T) space, and readers rebuild full prompts (``calls_of``). ``None`` means that
something did not happen; 0.0 means that it happened and was zero. Unknown fields are errors: a typo must not vanish.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from monologue.traces import names
from monologue.traces.codes import pack_bytes, pack_floats, pack_ids, unpack_bytes, unpack_floats, unpack_ids

SCHEMA_VERSION = 1
Attribute: TypeAlias = "str | bool | int | float"
PREFIX_CAUSES = ("template", "retokenised", "context edited", "truncated", "other")


class Record(BaseModel):
    """A line of a trace."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EpisodeStart(Record):
    """An episode begins."""

    record: Literal["episode_start"] = "episode_start"
    schema_version: int = SCHEMA_VERSION
    """Version of these records."""
    run_id: str
    """The run it belongs to."""
    episode_id: str
    """Unique, 32 hex digits; the trace id."""
    root_span_id: str
    """Parent of the episode's first spans, 16 hex digits."""
    problem_id: str
    """What is played."""
    task: str
    """The task it is from."""
    graph: str
    """The graph that is played."""
    group_id: str
    """Episodes of one problem share it."""
    sample_index: int
    """Which of the group, from 0."""
    attempt: int
    """How often it was begun before."""
    started_ns: int
    """Nanoseconds since 1970."""
    question: str
    """The problem's question."""
    choices: tuple[str, ...]
    """Answers to choose from."""
    gold: int | None
    """Index of the right choice; None where nobody knows."""
    family: str
    """Question family; empty where a task has none."""
    extra: dict[str, Any]
    """Facts of the play, such as a control."""


class SpanEvent(Record):
    """Something that happened at one moment of a span."""

    name: str
    """What happened."""
    time_ns: int
    """Nanoseconds since 1970."""
    attributes: dict[str, Attribute]
    """Details."""


class SpanRecord(Record):
    """A finished step."""

    record: Literal["span"] = "span"
    episode_id: str
    """Its episode."""
    seq: int
    """Order of the span's beginning within its episode, from 0."""
    name: str
    """OpenTelemetry span name."""
    kind: Literal["policy", "tool", "node"]
    """What sort of step."""
    trace_id: str
    """32 hex digits."""
    span_id: str
    """16 hex digits."""
    parent_id: str
    """Span id of the parent, the episode's root where there is none."""
    start_ns: int
    """Nanoseconds since 1970."""
    end_ns: int
    """Nanoseconds since 1970."""
    status: Literal["ok", "error"]
    """error: an exception left the step."""
    attributes: dict[str, Attribute]
    """Facts under the names of ``monologue.traces.names``."""
    events: tuple[SpanEvent, ...] = ()
    """Moments within the step."""


class EpisodeEnd(Record):
    """An episode ends."""

    record: Literal["episode_end"] = "episode_end"
    episode_id: str
    """Its episode."""
    ended_ns: int
    """Nanoseconds since 1970."""
    status: Literal["ok", "failed", "cancelled"]
    """ok: the graph ran to its end, with or without an answer."""
    answer: str | None
    """The conclusion; None where there is none."""
    error: str | None
    """Why it failed."""
    calls: int
    """Policy spans that were written."""
    spans: int
    """All spans that were written."""
    turns: int
    """Policy and tool calls together."""


class Annotation(Record):
    """Something said about a step or an episode afterwards."""

    record: Literal["annotation"] = "annotation"
    episode_id: str
    """Its episode."""
    span_id: str | None
    """Its span; None: the whole episode."""
    name: str
    """Of the reward, advantage or remark."""
    value: float | None
    """Number; None for a remark in words."""
    text: str | None
    """Words."""
    weight: float
    """Share in a total reward."""
    scope: Literal["token", "turn", "role", "episode"]
    """What the value is about."""
    role: str | None
    """Where the scope is a role."""
    source: str
    """Who says so, e.g. ``task:shapes``."""
    created_ns: int
    """Nanoseconds since 1970."""
    values: str | None = None
    """One value a token, base64 float32, where the scope is token."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A picture as a call saw it."""

    sha256: str
    """Name of the file in ``images/``."""
    width: int
    """Pixels of the stored picture."""
    height: int
    """Pixels."""
    grid: tuple[int, int, int]
    """Patches along time, height, width; zeros where the engine has no grid."""
    placeholder_start: int
    """Index of its first placeholder in the prompt ids."""
    placeholder_count: int
    """Visual tokens."""
    processor_hash: str
    """What made patches of pixels."""


@dataclass(frozen=True, slots=True)
class PolicyCall:
    """One call of a policy, whole."""

    span_id: str
    """Its span."""
    episode_id: str
    """Its episode."""
    seq: int
    """Order within the episode."""
    turn: int
    """Number among the calls of its stream, from 0."""
    role: str
    """The seat."""
    stream: str
    """Which growing sequence of ids it belongs to; the role unless a graph says otherwise."""
    node: str
    """Node of the graph."""
    edge: str | None
    """Edge taken after it."""
    policy_id: str
    """The model across its weights versions."""
    weights_version: str
    """Which weights sampled."""
    trainable: bool
    """False: never trained on."""
    prompt_ids: tuple[int, ...]
    """The whole prompt."""
    sampled_ids: tuple[int, ...]
    """What was sampled."""
    sampled_logprobs: tuple[float, ...] | None
    """Nats, of the distribution really sampled; None where nothing was sampled or the engine returns text only."""
    loss_mask: bytes
    """1 where a sampled id may be trained on."""
    prefix_length: int | None
    """Leading ids shared with the stream's call before; None for its first call, 0 where the prefix broke."""
    prefix_break: str | None
    """Why the prefix broke."""
    sampling: Mapping[str, Any]
    """temperature, top_p, top_k, seed, max_tokens."""
    engine: str
    """What ran the model."""
    engine_version: str
    """Its version."""
    model: str
    """The model's name or folder."""
    tokenizer_hash: str
    """Same hash, same ids."""
    template_hash: str
    """Same hash, same layout of messages."""
    finish_reason: str
    """stop, length or abort."""
    truncated: bool
    """The reply was cut off."""
    images: tuple[ImageRef, ...]
    """Pictures of the prompt, in order."""
    messages: tuple[str, ...]
    """The new messages of this turn, JSON."""
    output: str
    """The reply as text, for people."""
    action: str | None
    """The parsed action, JSON; None where the reply did not parse."""
    parse_error: str | None
    """Why it did not."""
    cached_tokens: int | None
    """Prompt tokens that the engine had in a cache; None where it does not say."""
    failed: bool
    """An exception left the call's step after it had sampled; whatever followed did not follow from it."""
    weights: tuple[tuple[str, int, int], ...] = ()
    """(version, first, end) of the sampled ids where the weights changed in the middle; empty where one version sampled all, which is
    then ``weights_version``, else the last of these.
    """
    server: str | None = None
    """Host and port that answered; None in process."""
    dtype: str | None = None
    """Numbers that the engine computes in; None where it does not say."""
    reported: tuple[int, int] | None = None
    """Prompt and reply in the tokens that a hosted model counts and bills; None elsewhere."""
    sampled_entropies: tuple[float, ...] | None = None
    """Nats, of the distribution behind each sampled id; None where the engine does not say."""
    habit: str | None = None
    """How it thinks, as JSON; None of policies that do not take latent steps."""
    chosen: tuple[tuple[int, ...], ...] = ()
    """Patches that each latent step read again, a tuple a step; empty where there was none."""


def attributes_of(call: Mapping[str, Any]) -> dict[str, Attribute]:
    """A call's facts (fields of PolicyCall, ``prompt_delta`` in place of ``prompt_ids``) as span attributes; None is left out."""
    sampling = call["sampling"]
    found: dict[str, Attribute | None] = {
        names.OPERATION: "chat",
        names.PROVIDER: call["engine"],
        names.MODEL: call["model"],
        names.TEMPERATURE: sampling.get("temperature"),
        names.TOP_P: sampling.get("top_p"),
        names.TOP_K: sampling.get("top_k"),
        names.MAX_TOKENS: sampling.get("max_tokens"),
        names.SEED: sampling.get("seed"),
        names.FINISH: json.dumps([call["finish_reason"]]),
        names.INPUT_TOKENS: call["prompt_length"],
        names.OUTPUT_TOKENS: len(call["sampled_ids"]),
        names.CACHED_TOKENS: call["cached_tokens"],
        names.INPUT_MESSAGES: "[" + ", ".join(call["messages"]) + "]",
        names.OUTPUT_MESSAGES: _said(call["output"], call["finish_reason"]),
        names.POLICY: call["policy_id"],
        names.WEIGHTS: call["weights_version"],
        names.WEIGHTS_BY_TOKEN: json.dumps(call["weights"]) if call.get("weights") else None,
        names.REPORTED: json.dumps(call["reported"]) if call.get("reported") else None,
        names.TRAINABLE: call["trainable"],
        names.PROMPT_DELTA: pack_ids(call["prompt_delta"]),
        names.PROMPT_LENGTH: call["prompt_length"],
        names.PREFIX_LENGTH: call["prefix_length"],
        names.PREFIX_BREAK: call["prefix_break"],
        names.SAMPLED_IDS: pack_ids(call["sampled_ids"]),
        names.SAMPLED_LOGPROBS: None if call["sampled_logprobs"] is None else pack_floats(call["sampled_logprobs"]),
        names.SAMPLED_ENTROPIES: None if call.get("sampled_entropies") is None else pack_floats(call["sampled_entropies"]),
        names.LOSS_MASK: pack_bytes(call["loss_mask"]),
        names.ENGINE: call["engine"],
        names.ENGINE_VERSION: call["engine_version"],
        names.DTYPE: call.get("dtype"),
        names.HABIT: call.get("habit"),
        **_address(call.get("server")),
        names.TOKENIZER: call["tokenizer_hash"],
        names.TEMPLATE: call["template_hash"],
        names.TRUNCATED: call["truncated"],
        names.IMAGES: json.dumps([_image(image) for image in call["images"]]) if call["images"] else None,
        names.OUTPUT: call["output"],
        names.ACTION: call["action"],
        names.PARSE_ERROR: call["parse_error"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _address(url: str | None) -> dict[str, Attribute | None]:
    """Host and port of a server, as OpenTelemetry names them."""
    if not url:
        return {}
    parts = urlsplit(url)
    return {names.SERVER: parts.hostname, names.PORT: parts.port or (443 if parts.scheme == "https" else 80)}


def _said(text: str, finish: str) -> str:
    return json.dumps([{"role": "assistant", "parts": [{"type": "text", "content": text}], "finish_reason": finish}], ensure_ascii=False)


def _image(image: Any) -> dict[str, Any]:
    return {name: getattr(image, name) for name in ImageRef.__dataclass_fields__}


def calls_of(spans: Iterable[SpanRecord]) -> list[PolicyCall]:
    """The policy calls among an episode's spans in order, prompts rebuilt. Raises ValueError where a prefix is missing."""
    streams: dict[str, tuple[int, ...]] = {}
    calls = []
    for span in sorted(spans, key=lambda one: one.seq):
        if span.kind == "policy" and names.SAMPLED_IDS in span.attributes:
            call = _call(span, streams)
            streams[call.stream] = call.prompt_ids + call.sampled_ids
            calls.append(call)
    return calls


def _call(span: SpanRecord, streams: Mapping[str, tuple[int, ...]]) -> PolicyCall:
    a: Mapping[str, Any] = span.attributes
    stream, prefix = a[names.STREAM], a.get(names.PREFIX_LENGTH)
    before = streams.get(stream, ())
    if prefix is not None and prefix > len(before):
        raise ValueError(
            f"span {span.span_id}: its prompt begins with {prefix} ids of the call before it, of which only {len(before)} are here"
        )
    logprobs = a.get(names.SAMPLED_LOGPROBS)
    keys = {
        "temperature": names.TEMPERATURE,
        "top_p": names.TOP_P,
        "top_k": names.TOP_K,
        "seed": names.SEED,
        "max_tokens": names.MAX_TOKENS,
    }
    return PolicyCall(
        span_id=span.span_id,
        episode_id=span.episode_id,
        seq=span.seq,
        turn=a[names.TURN],
        role=a[names.ROLE],
        stream=stream,
        node=a[names.NODE],
        edge=a.get(names.EDGE),
        policy_id=a[names.POLICY],
        weights_version=a[names.WEIGHTS],
        trainable=a[names.TRAINABLE],
        prompt_ids=before[: prefix or 0] + unpack_ids(a[names.PROMPT_DELTA]),
        sampled_ids=unpack_ids(a[names.SAMPLED_IDS]),
        sampled_logprobs=None if logprobs is None else unpack_floats(logprobs),
        loss_mask=unpack_bytes(a[names.LOSS_MASK]),
        prefix_length=prefix,
        prefix_break=a.get(names.PREFIX_BREAK),
        sampling={name: a.get(key) for name, key in keys.items()},
        engine=a[names.ENGINE],
        engine_version=a[names.ENGINE_VERSION],
        model=a[names.MODEL],
        tokenizer_hash=a[names.TOKENIZER],
        template_hash=a[names.TEMPLATE],
        finish_reason=json.loads(a[names.FINISH])[0],
        truncated=a[names.TRUNCATED],
        images=tuple(ImageRef(**{**one, "grid": tuple(one["grid"])}) for one in json.loads(a.get(names.IMAGES, "[]"))),
        messages=tuple(json.dumps(one, ensure_ascii=False) for one in json.loads(a[names.INPUT_MESSAGES])),
        output=a[names.OUTPUT],
        action=a.get(names.ACTION),
        parse_error=a.get(names.PARSE_ERROR),
        cached_tokens=a.get(names.CACHED_TOKENS),
        failed=span.status == "error",
        weights=tuple((version, first, end) for version, first, end in json.loads(a.get(names.WEIGHTS_BY_TOKEN, "[]"))),
        server=f"{a[names.SERVER]}:{a[names.PORT]}" if names.SERVER in a else None,
        dtype=a.get(names.DTYPE),
        habit=a.get(names.HABIT),
        reported=None if names.REPORTED not in a else tuple(json.loads(a[names.REPORTED])),
        sampled_entropies=unpack_floats(a[names.SAMPLED_ENTROPIES]) if names.SAMPLED_ENTROPIES in a else None,
        chosen=tuple(tuple(json.loads(str(one.attributes["chosen"]))) for one in span.events if one.name == names.LATENT_STEP),
    )
