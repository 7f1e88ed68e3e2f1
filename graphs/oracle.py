"""The oracle's seat: says what a perfect policy would say, through the same graph, codec and recorder as any policy.

So ``play`` with oracles in its seats writes a training set for imitation in the same form as every other trace: the ids of
the oracle's actions stand where sampled ids stand, with loss on them; log-probs are None, since nothing was sampled. Pictures
are located as the model to be trained will see them, for which the answerer's oracle is lent that model's eyes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from monologue.agents.codec import Codec, Ids, TinyCodec
from monologue.agents.messages import Conclude, Look
from monologue.agents.policy import Policy
from monologue.backends.base import Facts, Generation, ImageFacts, Prompt, RequestRefused, Sampling
from monologue.backends.pictures import Eyes, locate
from monologue.backends.scripted import ScriptedBackend
from monologue.backends.tokens import ByteTokenizer
from monologue.graphs.registry import Graph
from monologue.graphs.state import GraphError
from monologue.tasks.base import Problem

Seat: TypeAlias = "Policy | Callable[[Graph, Problem, str], Policy]"
"""A policy, or what makes one for a role in one episode."""


class Lines:
    """What a perfect policy says in one role of one episode, in the language of a codec."""

    def __init__(self, graph: Graph, problem: Problem, role: str, codec: Codec) -> None:
        if graph.oracle is None:
            raise GraphError(f"graph {graph.name!r} has no oracle; seat a policy there")
        actions = graph.oracle(problem, **graph.options)
        if role not in actions:
            raise GraphError(f"the oracle does not know what {role!r} would say in the graph {graph.name!r}; seat a policy there")
        self._actions, self._codec = actions[role], codec

    @property
    def sampling(self) -> Sampling:
        """With room for the longest line."""
        return Sampling(max_tokens=max(len(self._codec.action_ids(action)) for action in self._actions))

    def say(self, index: int, prompt: Ids) -> Ids:
        """The ids of a line, without those that the prompt already ends with because the graph forced the kind of action. A forced
        conclusion has no room left for its explanation. Raises RequestRefused where the lines are used up.
        """
        if index >= len(self._actions):
            raise RequestRefused(f"the oracle has said all its {len(self._actions)} lines, but the graph asks for one more")
        action = self._actions[index]
        if not isinstance(action, Look | Conclude):
            return self._codec.action_ids(action)
        force = self._codec.force("look" if isinstance(action, Look) else "conclude")
        if prompt[-len(force) :] != force:
            return self._codec.action_ids(action)
        bare = replace(action, explanation="") if isinstance(action, Conclude) else action
        return self._codec.action_ids(bare)[len(force) :]


class Recital:
    """An engine that says one list of actions in order, for one role in one episode."""

    def __init__(self, lines: Lines, facts: Facts, eyes: Eyes | None) -> None:
        self.facts = facts
        self._lines, self._eyes, self._said = lines, eyes, 0

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        ids = self._lines.say(self._said, prompt.ids)
        self._said += 1
        return Generation(ids, None, "stop", self.facts.weights_version, self._located(prompt), seed=sampling.seed)

    async def score(self, prompt: Prompt, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
        raise RequestRefused("an oracle has no probabilities to score with")

    async def load(self, weights: str, version: str) -> None:
        raise RequestRefused("an oracle has no weights to load")

    async def aclose(self) -> None:
        pass

    def _located(self, prompt: Prompt) -> tuple[ImageFacts, ...]:
        if not prompt.pictures:
            return ()
        if self._eyes is None:
            raise GraphError(
                "the oracle was shown a picture but lent no eyes; pass oracle(codec, eyes=engine) with the engine to be trained"
            )
        rooms = tuple(self._eyes.placeholders(picture.image) for picture in prompt.pictures)
        return locate(prompt, rooms, self._eyes.image_token_id, self._eyes.processor_hash)


def oracle(codec: Codec, eyes: Eyes | None = None, policy_id: str = "oracle") -> Callable[[Graph, Problem, str], Policy]:
    """A seat in which the graph's oracle plays, in the language of ``codec``; ``eyes`` are needed where pictures are shown."""
    facts = Facts("oracle", "oracle", "1", "oracle", codec.tokenizer_hash, codec.template_hash, eyes is not None, 1 << 20, logprobs=False)

    def seat(graph: Graph, problem: Problem, role: str) -> Policy:
        lines = Lines(graph, problem, role, codec)
        return Policy(Recital(lines, facts, eyes), codec, lines.sampling, policy_id)

    return seat


def scripted(policy_id: str = "scripted") -> Callable[[Graph, Problem, str], Policy]:
    """A seat in which the scripted engine says the oracle's lines in bytes: no model and no torch; every log-prob is 0.0."""
    tokenizer = ByteTokenizer()
    room = ScriptedBackend((), tokenizer).placeholders
    codec = TinyCodec(tokenizer, lambda picture: room(picture.image).count)

    def seat(graph: Graph, problem: Problem, role: str) -> Policy:
        lines = Lines(graph, problem, role, codec)
        say = ScriptedBackend(lambda request: lines.say(request.index, request.prompt.ids), tokenizer)
        return Policy(say, codec, lines.sampling, policy_id)

    return seat
