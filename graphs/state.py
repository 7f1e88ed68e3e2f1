"""What travels through a graph: plain values in the state, live objects in the context.

The state is what LangGraph streams, draws and could checkpoint, so it holds strings, numbers and plain records only. Models,
pictures and the recorder are in the ``Context``, which LangGraph hands to every node as ``runtime.context`` and never stores.
Streams of ids live there too: an episode is played in one go, and one that is cut off is played again from its start.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypedDict

from monologue.agents.codec import Force, Schema
from monologue.agents.messages import Action, Message, ParseFault
from monologue.agents.policy import Policy, Stream
from monologue.agents.prompts import Wording
from monologue.agents.tools import Toolbox
from monologue.backends.base import Picture
from monologue.traces.recorder import EpisodeRecorder, PolicySpan


class GraphError(ValueError):
    """A graph, its seats or its options do not fit together."""


class State(TypedDict, total=False):
    """One episode between two nodes."""

    question: str
    """The problem's question."""
    choices: list[str]
    """Answers to choose from; may be empty."""
    pending: dict[str, Any]
    """The plain action that waits to be carried out, ``{"kind": "look", "question": ...}``."""
    heard: dict[str, Any]
    """What the next policy call hears: ``{"kind": "reply" | "fault" | "unanswered" | "caption", "text": ...}``; empty at
    first.
    """
    dialogue: Annotated[list[dict[str, Any]], operator.add]
    """All turns so far: ``{"role": ..., "kind": ..., ...}``; each node adds its own."""
    asked: int
    """Calls of the seat that concludes; the budget is counted in these."""
    looks: int
    """Questions that the answerer was asked."""
    answer: str | None
    """The conclusion; None until there is one, and for good where the budget ends first."""
    explanation: str
    """Why, where the policy said so."""


def same_question(look: int, question: str) -> str:
    """The answerer is asked what the questioner asks."""
    return question


@dataclass
class Context:
    """The live side of one episode; LangGraph's ``context_schema``."""

    seats: Mapping[str, Policy]
    """Policy by role."""
    record: EpisodeRecorder
    """Where this episode's spans go."""
    pictures: tuple[Picture, ...] = ()
    """What the answerer sees."""
    seed: int = 0
    """Seed of this episode; every call draws its own from it."""
    max_turns: int = 8
    """The concluding seat may act so often; then the episode ends without an answer."""
    toolbox: Toolbox = field(default_factory=Toolbox)
    """The builder's tools."""
    asks: Callable[[int, str], str] = same_question
    """What the answerer is really asked, given the number of the look and the question; other than identity only in controls.
    """
    streams: dict[str, Stream] = field(default_factory=dict)
    """The growing ids of each role, or of each branch that has a stream of its own."""
    parent: Any = None
    """Span under which this context's steps stand; None: the episode."""
    busy: set[str] = field(default_factory=set)
    """Streams in which a call is under way."""

    def wording(self, role: str) -> Wording:
        return self._seat(role).codec.wording

    def opened(self, stream: str) -> bool:
        """Whether this role (or branch) has acted before."""
        return stream in self.streams

    @contextmanager
    def turn(self, role: str, node: str, stream: str | None = None) -> Iterator[Turn]:
        """One policy call of a role, as a span. Whoever acts through this is traced and trainable.

        Parallel branches, and subgraphs that begin a dialogue of their own, name a ``stream`` each: one stream is one growing sequence,
        so two calls of it at once raise GraphError. A turn that an exception leaves is recorded, but its stream is as it was before, so
        a node that LangGraph tries again says its piece once more and not twice.
        """
        name = stream or role
        if name in self.busy:
            raise GraphError(
                f"two calls of {name!r} at once: a stream grows one call at a time; give parallel branches streams of their own, "
                f"context.turn({role!r}, {node!r}, stream=...)"
            )
        known = self.streams.get(name)
        growing = copy(known) if known else Stream(self._seat(role), name, self.seed)
        self.busy.add(name)
        try:
            with self.record.policy(role=role, node=node, stream=name, parent=self.parent) as span:
                yield Turn(span, growing)
            self.streams[name] = growing
        finally:
            self.busy.discard(name)

    @contextmanager
    def step(self, name: str, **facts: str | int | float | bool) -> Iterator[Context]:
        """A step that is no policy's, such as a subgraph, as a span; the context that it yields puts whatever happens within under it."""
        with self.record.step(name=name, facts=facts, parent=self.parent) as span:
            yield replace(self, parent=span)

    def _seat(self, role: str) -> Policy:
        if role not in self.seats:
            raise GraphError(f"no policy is seated as {role!r}; seats are taken for {sorted(self.seats)}")
        return self.seats[role]


@dataclass
class Turn:
    """A policy call that is being made."""

    span: PolicySpan
    """Its span; ``span.edge`` takes the name of the edge that follows."""
    stream: Stream
    """The role's ids."""

    @property
    def logprobs(self) -> tuple[float, ...] | None:
        """Log-probs in nats of what the last ``act`` sampled; None where the engine gives none."""
        return None if self.stream.last is None else self.stream.last.logprobs

    async def act(
        self, messages: list[Message], kinds: tuple[type, ...], tools: tuple[Schema, ...] = (), force: Force | None = None
    ) -> Action | ParseFault:
        """See ``Stream.act``."""
        return await self.stream.act(self.span, messages, kinds, tools, force)
