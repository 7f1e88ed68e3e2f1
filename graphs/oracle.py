"""The oracle's seat: says what a perfect policy would say, through the same graph, codec and recorder as any policy.

So ``play`` with oracles in its seats writes a training set for imitation in the same form as every other trace: the ids of
the oracle's actions stand where sampled ids stand, with loss on them; log-probs are None, since nothing was sampled. Pictures
are located as the model to be trained will see them, for which the answerer's oracle is lent that model's eyes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from monologue.agents.codec import Codec, Ids
from monologue.agents.load import Eyes
from monologue.agents.policy import Policy
from monologue.backends.base import Facts, Generation, ImageFacts, Prompt, RequestRefused, Sampling
from monologue.backends.pictures import locate
from monologue.graphs.registry import Graph
from monologue.graphs.state import GraphError
from monologue.tasks.base import Problem

Seat: TypeAlias = "Policy | Callable[[Graph, Problem, str], Policy]"
"""A policy, or what makes one for a role in one episode."""


class Recital:
    """An engine that says one list of actions in order, for one role in one episode."""

    def __init__(self, lines: Sequence[Ids], facts: Facts, eyes: Eyes | None) -> None:
        self.facts = facts
        self._lines, self._eyes, self._said = lines, eyes, 0

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        if self._said == len(self._lines):
            raise RequestRefused(f"the oracle has said all its {len(self._lines)} lines, but the graph asks for one more")
        line = self._lines[self._said]
        self._said += 1
        ids = line[_forced(prompt.ids, line) :]
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


def _forced(prompt: Ids, line: Ids) -> int:
    """How many ids of the line the prompt already ends with, because the graph forced the kind of action."""
    return next((k for k in range(len(line) - 1, 0, -1) if prompt[-k:] == line[:k]), 0)


def oracle(codec: Codec, eyes: Eyes | None = None, policy_id: str = "oracle") -> Callable[[Graph, Problem, str], Policy]:
    """A seat in which the graph's oracle plays, in the language of ``codec``; ``eyes`` are needed where pictures are shown."""
    facts = Facts("oracle", "oracle", "1", "oracle", codec.tokenizer_hash, codec.template_hash, eyes is not None, 1 << 20, logprobs=False)

    def seat(graph: Graph, problem: Problem, role: str) -> Policy:
        if graph.oracle is None:
            raise GraphError(f"graph {graph.name!r} has no oracle; seat a policy there")
        lines = [codec.action_ids(action) for action in graph.oracle(problem)[role]]
        longest = Sampling(max_tokens=max(map(len, lines)))
        return Policy(Recital(lines, facts, eyes), codec, longest, policy_id)

    return seat
