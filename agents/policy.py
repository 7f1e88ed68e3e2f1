"""A policy in its seat, and the one growing stream of ids that it has in an episode.

A stream is opened by the first messages and afterwards only extended: prompt of call n+1 = prompt of call n + what was
sampled + the new messages. That is what makes a trace trainable as it lies, and why ``act`` is the only place in the project
that calls a backend for a decision. Every call is recorded on the span it is given, ids verbatim, before its action is looked
at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from monologue.agents.codec import Codec, Force, Schema
from monologue.agents.messages import Action, Message, ParseFault, plain, plain_message
from monologue.agents.spoken import Turn, grown, reply
from monologue.backends.base import Backend, Generation, Picture, Prompt, Sampling, Spoken


class CallSpan(Protocol):
    """Where a call is recorded: the span that ``monologue.traces.recorder`` opens."""

    def record(self, **call: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A model that takes a seat: what runs it, what reads and writes its tokens, how it is sampled."""

    backend: Backend
    """The engine."""
    codec: Codec
    """Its model family's language."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn; stop ids come from the codec, seeds from the episode."""
    policy_id: str = "policy"
    """Name of the model across its weights versions."""
    trainable: bool = True
    """False: recorded, but its tokens are never trained on."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How long a call was, in tokens."""

    turn: int
    """Number among the calls of its stream, from 0."""
    prompt: int
    """Prompt ids."""
    sampled: int
    """Sampled ids."""
    cached: int | None
    """Prompt ids that the engine had in a cache; None where it does not say."""

    @property
    def total(self) -> int:
        return self.prompt + self.sampled


class Stream:
    """The ids of one (episode, role), grown verbatim."""

    def __init__(self, policy: Policy, role: str, seed: int) -> None:
        """``seed`` is the episode's; each call draws its own from it, the role and the call's number."""
        self.policy, self.role, self.seed = policy, role, seed
        self.ids: tuple[int, ...] = ()
        self.pictures: tuple[Picture, ...] = ()
        self.turns: tuple[Turn, ...] = ()
        """The same in words, for engines that take these."""
        self.calls = 0
        self.usage: list[Usage] = []
        """One entry a call."""
        self.last: Generation | None = None
        """What was sampled last."""
        self._closed = True

    async def act(
        self,
        span: CallSpan,
        messages: Sequence[Message],
        kinds: tuple[type, ...],
        tools: Sequence[Schema] = (),
        force: Force | None = None,
    ) -> Action | ParseFault:
        """One call: the messages are appended, a reply is sampled, recorded and parsed. An action not of ``kinds`` is a
        fault.

        ``tools`` are explained when the stream opens; ``force`` fixes the kind of action by its first ids. Raises
        BackendError, CodecError.
        """
        codec = self.policy.codec
        new = codec.extend(messages, self._closed) if self.calls else codec.open(messages, tools)
        forced = codec.force(force) if force else ()
        shown = (*self.pictures, *(picture for message in messages for picture in message.pictures))
        spoken = Spoken(grown(self.turns, messages), tuple(tools), force)
        prompt = Prompt((*self.ids, *new, *forced), shown, str(self.seed), spoken)
        sampling = replace(self.policy.sampling, stop_ids=codec.stop_ids, seed=self._draw())
        generation = await self.policy.backend.generate(prompt, sampling)
        self.ids, self.pictures = prompt.ids + generation.ids, prompt.pictures
        self._closed = bool(generation.ids) and generation.ids[-1] in codec.stop_ids
        self.usage = [*self.usage, Usage(self.calls, len(prompt.ids), len(generation.ids), generation.cached_tokens)]
        self.calls, self.last = self.calls + 1, generation
        action = _of_kinds(codec.parse((*forced, *generation.ids)), kinds, codec.text(generation.ids))
        self.turns = grown(spoken.turns, [reply(action)])
        self._record(span, prompt, sampling, generation, messages, action)
        return action

    def _draw(self) -> int:
        digest = hashlib.sha256(f"{self.seed}/{self.role}/{self.calls}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def _record(
        self,
        span: CallSpan,
        prompt: Prompt,
        sampling: Sampling,
        generation: Generation,
        messages: Sequence[Message],
        action: Action | ParseFault,
    ) -> None:
        facts = self.policy.backend.facts
        span.record(
            policy_id=self.policy.policy_id,
            weights_version=generation.weights_version,
            weights=generation.weights,
            trainable=self.policy.trainable,
            prompt_ids=prompt.ids,
            sampled_ids=generation.ids,
            sampled_logprobs=generation.logprobs,
            sampled_entropies=generation.entropies,
            loss_mask=bytes([1]) * len(generation.ids),
            sampling=_settings(sampling, generation.seed) if facts.logprobs else _UNKNOWN,
            engine=facts.engine,
            engine_version=facts.engine_version,
            server=generation.server,
            dtype=facts.extra.get("dtype"),
            habit=facts.extra.get("habit"),
            model=facts.model,
            tokenizer_hash=self.policy.codec.tokenizer_hash,
            template_hash=self.policy.codec.template_hash,
            finish_reason=generation.finish_reason,
            truncated=generation.finish_reason == "length",
            images=generation.images,
            thoughts=generation.thoughts,
            cached_tokens=generation.cached_tokens,
            reported=generation.reported,
            messages=[json.dumps(plain_message(message), ensure_ascii=False) for message in messages],
            action=None if isinstance(action, ParseFault) else json.dumps(plain(action), ensure_ascii=False),
            parse_error=action.reason if isinstance(action, ParseFault) else None,
            output=action.text if isinstance(action, ParseFault) else self.policy.codec.text(generation.ids),
        )


def _settings(sampling: Sampling, seed: int | None) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "max_tokens": sampling.max_tokens,
    }


_UNKNOWN: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k", "seed", "max_tokens"))
"""An engine that returns text only drew it as it saw fit, or drew nothing at all."""


def _of_kinds(action: Action | ParseFault, kinds: tuple[type, ...], text: str) -> Action | ParseFault:
    if isinstance(action, (ParseFault, *kinds)):
        return action
    wanted = " or ".join(kind.__name__.lower() for kind in kinds)
    return ParseFault(f"expected {wanted}, got {type(action).__name__.lower()}.", text)


async def close(policies: Iterable[object]) -> None:
    """Closes the engines of those that are policies."""
    for policy in policies:
        if isinstance(policy, Policy):
            await policy.backend.aclose()
