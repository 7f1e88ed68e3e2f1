"""Writes a trace while a graph is played: every step an OpenTelemetry span, on disk the moment it ends.

Why an own tracer provider: the global one can be set only once, and spans vanish when another library was first. Why an own synchronous
processor: the batch processor loses everything that is in its queue when a process is killed (100 of 100 spans in our trial). Why explicit
parents: a context variable kept open across ``yield`` or between tasks attaches spans to the wrong parent. Further processors (an OTLP
exporter, say) may be added; they see the same spans and the root.

    with recorder.episode(problem_id=..., ...) as episode:
        with episode.policy(role="questioner", node="ask") as span:
            span.record(prompt_ids=..., sampled_ids=..., ...)
            span.edge = "look"
        episode.finish(answer="red")

Leaving an episode without ``finish`` records it as failed, by cancellation as cancelled; the exception goes on its way.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from PIL.Image import Image

from monologue.traces import names
from monologue.traces.images import Picture, digest
from monologue.traces.png import png_bytes
from monologue.traces.privacy import Capture, Privacy, Redact
from monologue.traces.schema import SCHEMA_VERSION, Annotation, EpisodeEnd, EpisodeStart, SpanEvent, SpanRecord
from monologue.traces.store import RunWriter

LIMITS = SpanLimits(max_attributes=512, max_events=4096, max_attribute_length=None)
Cause = BaseException | None


class Ids(IdGenerator):
    """Ids from the system's randomness. OpenTelemetry draws its own from Python's ``random``, which every trainer seeds: two runs of one
    seed would share their ids, and a resumed run would give some away a second time.
    """

    def generate_span_id(self) -> int:
        return secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        return secrets.randbits(128) or 1


class LineProcessor(SpanProcessor):
    """Ended spans to lines of the run, at once. The root is no line: episode start and end stand for it."""

    def __init__(self, run: RunWriter) -> None:
        self.run = run

    def on_end(self, span: ReadableSpan) -> None:
        attributes = span.attributes or {}
        kind = attributes.get(names.KIND)
        if kind == "episode":
            return
        assert span.context and span.parent
        events = tuple(
            SpanEvent.model_construct(name=e.name, time_ns=e.timestamp, attributes=dict(e.attributes or {})) for e in span.events
        )
        self.run.write(
            SpanRecord.model_construct(
                record="span",
                episode_id=attributes[names.EPISODE],
                seq=attributes[names.SEQ],
                name=span.name,
                kind=kind,
                trace_id=f"{span.context.trace_id:032x}",
                span_id=f"{span.context.span_id:016x}",
                parent_id=f"{span.parent.span_id:016x}",
                start_ns=span.start_time,
                end_ns=span.end_time,
                status="error" if span.status.status_code is StatusCode.ERROR else "ok",
                attributes=dict(attributes),
                events=events,
            )
        )


class Recorder:
    """Episodes of one process into one run."""

    def __init__(
        self, run: RunWriter, extra_processors: Sequence[SpanProcessor] = (), *, capture: Capture = "all", redact: Redact | None = None
    ) -> None:
        """``extra_processors`` see every span too, e.g. an OTLP exporter's. Of ``capture`` and ``redact`` tells traces/privacy.py."""
        self.run = run
        self.privacy = Privacy(capture, redact)
        resource = Resource.create({"service.name": "monologue", "openinference.project.name": "monologue", names.RUN: run.run_id})
        self._provider = TracerProvider(resource=resource, span_limits=LIMITS, shutdown_on_exit=False, id_generator=Ids())
        for processor in (LineProcessor(run), *extra_processors):
            self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("monologue", schema_url=names.SCHEMA_URL)

    def episode(
        self,
        *,
        problem_id: str,
        task: str,
        graph: str,
        group_id: str,
        question: str,
        choices: Sequence[str] = (),
        gold: int | None = None,
        sample_index: int = 0,
        attempt: int = 0,
        family: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> EpisodeRecorder:
        """A context manager that records one run of a graph on one problem."""
        facts: dict[str, Any] = {
            names.KIND: "episode",
            names.VERSION: SCHEMA_VERSION,
            names.RUN: self.run.run_id,
            names.GROUP: group_id,
            names.SAMPLE: sample_index,
            names.ATTEMPT: attempt,
            names.OPERATION: "invoke_agent",
            names.AGENT: graph,
        }
        root = self.tracer.start_span(f"invoke_agent {graph}", context=Context(), attributes=facts)
        context = root.get_span_context()
        start = EpisodeStart(
            run_id=self.run.run_id,
            episode_id=f"{context.trace_id:032x}",
            root_span_id=f"{context.span_id:016x}",
            problem_id=problem_id,
            task=task,
            graph=graph,
            group_id=group_id,
            sample_index=sample_index,
            attempt=attempt,
            started_ns=time.time_ns(),
            question=question,
            choices=tuple(choices),
            gold=gold,
            family=family,
            extra=dict(extra or {}),
        )
        return EpisodeRecorder(self, self.privacy.start(start), root)


class EpisodeRecorder:
    """One episode being played."""

    def __init__(self, recorder: Recorder, start: EpisodeStart, root: Any) -> None:
        self.start = start
        self.id = start.episode_id
        self._recorder, self._root, self._privacy = recorder, root, recorder.privacy
        self._base: dict[str, Any] = {
            names.EPISODE: self.id,
            names.CONVERSATION: self.id,
            names.GROUP: start.group_id,
            names.SAMPLE: start.sample_index,
        }
        self._seq = itertools.count()  # of threads too
        self._written = self._calls = self._tools = 0
        self._streams: dict[str, tuple[tuple[int, ...], int, str]] = {}
        self._redacted: set[str] = set()
        self._turns: dict[str, int] = {}
        self._answer: str | None = None
        self._finished = False

    def __enter__(self) -> EpisodeRecorder:
        self._recorder.run.write(self.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Cause, trace: TracebackType | None) -> None:
        if error is None and not self._finished:
            error = RuntimeError("the episode was left without finish()")
        status = "ok" if error is None else "cancelled" if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)) else "failed"
        if error is not None:
            self._root.set_status(Status(StatusCode.ERROR, self._privacy.error(error)))
        self._root.end()
        self._recorder.run.write(
            EpisodeEnd(
                episode_id=self.id,
                ended_ns=time.time_ns(),
                status=status,  # type: ignore[arg-type]
                answer=self._answer,
                error=None if error is None else self._privacy.error(error),
                calls=self._calls,
                spans=self._written,
                turns=self._calls + self._tools,
            )
        )
        if kind is None and error is not None:
            raise error

    def store(self, image: Image) -> Picture:
        """Keeps a picture in the run and returns it with its hash; the shape of a run is without pictures. Raises RunError."""
        png = png_bytes(image)
        if self._privacy.capture == "all":
            self._recorder.run.keep(png)
        return Picture(digest(png), image)

    def finish(self, answer: str | None) -> None:
        """The graph has run to its end, with this answer or None."""
        self._answer, self._finished = None if answer is None else self._privacy.text(answer), True

    def annotate(
        self,
        *,
        name: str,
        value: float | None = None,
        text: str | None = None,
        weight: float = 1.0,
        scope: str = "episode",
        role: str | None = None,
        span_id: str | None = None,
        source: str,
    ) -> None:
        """A reward or remark about this episode or one of its spans."""
        said = None if text is None else self._privacy.text(text)
        facts = {"name": name, "value": value, "text": said, "weight": weight, "scope": scope, "role": role, "source": source}
        note = Annotation(episode_id=self.id, span_id=span_id, created_ns=time.time_ns(), **facts)  # type: ignore[arg-type]
        self._recorder.run.annotate(note)

    @contextmanager
    def policy(self, *, role: str, node: str, stream: str | None = None, parent: Any = None) -> Iterator[PolicySpan]:
        """A policy call of ``role`` in ``node``; ``stream`` names its growing sequence of ids where that is not the role's only one."""
        stream = stream or role
        turn = self._turns[stream] = self._turns.get(stream, -1) + 1
        facts = {names.KIND: "policy", names.AGENT: role, names.ROLE: role, names.STREAM: stream, names.NODE: node, names.TURN: turn}
        with self._span(f"chat {role}", facts, parent) as span:
            self._calls += 1
            call = PolicySpan(span, self._streams, stream, self._privacy, self._redacted)
            try:
                yield call
            finally:
                if call.edge is not None:
                    span.set_attribute(names.EDGE, call.edge)

    @contextmanager
    def tool(self, *, name: str, arguments: Mapping[str, Any], node: str, parent: Any = None) -> Iterator[ToolSpan]:
        """A tool call."""
        facts = {names.KIND: "tool", names.NODE: node, names.OPERATION: "execute_tool", names.TOOL_NAME: name}
        given = json.dumps(arguments, ensure_ascii=False, default=str)
        shown = given if self._privacy.open else self._privacy.arguments(given)
        facts |= {names.CAPTURE: "shape"} if shown is None else {names.TOOL_ARGUMENTS: shown}
        with self._span(f"execute_tool {name}", facts, parent) as span:
            self._tools += 1
            call = ToolSpan(span)
            try:
                yield call
            finally:
                result = None if call.result is None else self._privacy.text(call.result)
                if result is not None:
                    span.set_attribute(names.TOOL_RESULT, result)

    @contextmanager
    def step(self, *, name: str, facts: Mapping[str, str | int | float | bool], parent: Any = None) -> Iterator[Any]:
        """A step that no policy and no tool takes; yields its span, to be the parent of what happens within."""
        own = {names.KIND: "node", names.NODE: name, names.OPERATION: "invoke_workflow"}
        with self._span(f"step {name}", {**facts, **own}, parent) as span:
            yield span

    @contextmanager
    def _span(self, name: str, facts: Mapping[str, Any], parent: Any) -> Iterator[Span]:
        seq = next(self._seq)
        above = set_span_in_context(parent if parent is not None else self._root, Context())
        kind = SpanKind.CLIENT if facts[names.KIND] == "policy" else SpanKind.INTERNAL
        span: Any = self._recorder.tracer.start_span(name, context=above, kind=kind, attributes={**self._base, **facts, names.SEQ: seq})
        try:
            yield span
        except BaseException as error:
            told = self._privacy.error(error)
            span.set_status(Status(StatusCode.ERROR, told))
            span.set_attributes({names.ERROR_TYPE: type(error).__name__, names.ERROR: told})
            raise
        finally:
            self._written += 1
            span.end()


class PolicySpan:
    """A policy call being made."""

    def __init__(
        self, span: Any, streams: dict[str, tuple[tuple[int, ...], int, str]], stream: str, privacy: Privacy, redacted: set[str]
    ) -> None:
        self.edge: str | None = None
        """Name of the edge taken after the call."""
        self._span, self._streams, self._stream = span, streams, stream
        self._privacy, self._redacted = privacy, redacted

    @property
    def span(self) -> Any:
        """The OpenTelemetry span: parent of whatever happens within the call."""
        return self._span

    def record(self, **call: Any) -> None:
        """The call's facts: the fields of ``PolicyCall`` that a caller knows, with the full ``prompt_ids``; ``thoughts`` become events."""
        for step, thought in enumerate(call.pop("thoughts", ())):
            words = [self._privacy.text(word) for word in thought.words]
            facts = {"step": step, "chosen": json.dumps(thought.chosen), "chances": json.dumps(thought.chances)}
            told = {} if None in words else {"words": json.dumps(words, ensure_ascii=False)}
            told |= {} if thought.norm is None else {"norm": thought.norm}
            self._span.add_event(names.LATENT_STEP, {**facts, **told})
        prompt, sampled = tuple(call.pop("prompt_ids")), tuple(call["sampled_ids"])
        before = self._streams.get(self._stream)
        prefix, cause = (None, None) if before is None else shared_prefix(prompt, *before, call["template_hash"])
        delta = prompt[prefix or 0 :]
        facts = {**call, "prompt_delta": delta, "prompt_length": len(prompt), "prefix_length": prefix, "prefix_break": cause}
        self._span.set_attributes(self._privacy.call(facts, self._redacted, self._stream))
        self._streams[self._stream] = (prompt + sampled, len(prompt), call["template_hash"])


class ToolSpan:
    """A tool call being made."""

    def __init__(self, span: Any) -> None:
        self.result: str | None = None
        """What came back, as text."""
        self.span = span


def shared_prefix(prompt: tuple[int, ...], before: tuple[int, ...], boundary: int, template: str, now: str) -> tuple[int, str | None]:
    """How many leading ids the prompt shares with its stream: all that came before, or none, and then why.

    ``before`` is the last call's prompt and sampled ids, of which the first ``boundary`` are prompt.
    """
    if prompt[: len(before)] == before:
        return len(before), None
    if template != now:
        return 0, "template"
    same = next((i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), min(len(prompt), len(before)))
    if same == len(prompt):
        return 0, "truncated"
    return 0, "retokenised" if same >= boundary else "context edited"
