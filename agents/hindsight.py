"""What a questioner makes of a dialogue afterwards: how likely it was to conclude rightly, had it had to conclude at some point of it.

    belief(k)     log p(right conclusion | everything before question k)
    without(k)    log p(right conclusion | the whole dialogue, question k and what was heard on it left out)

Both are read off the ids of the trace: between two calls of one stream stands what the first said and what it heard, so a question is left
out by leaving out these ids, and nothing is decoded and encoded again. The conclusion is forced by its first ids and the right answer
scored behind them. That is the expectation of what a forced conclusion would score at temperature 1, and so has none of its noise.

    progress         belief(k + 1) - belief(k), nats: what question k has brought. It sums to last belief - first, so as a reward per turn
                     it is a shaping by potential (Ng et al. 1999): nothing is gained by going in circles. IM-RAG rewards progress, too.
    counterfactual   exp(belief(end)) - exp(without(k)): the share of the outcome that would have been lost without the question
                     (difference rewards, Wolpert and Tumer 2002; COMA, Foerster et al. 2018)

A question whose answer served only to ask the next one, which is then enough by itself, is worth little to ``counterfactual``; a question
whose answer says nothing by itself is worth little to ``progress``. A policy that weighs in words before it concludes is not heard
weighing here. Left out: playing on from where a question was not asked (true counterfactuals, many times the cost).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from monologue.agents.codec import Ids
from monologue.agents.messages import Conclude
from monologue.agents.policy import Policy
from monologue.backends.base import Prompt, Sampling
from monologue.traces.schema import PolicyCall
from monologue.traces.store import Episode

FLOOR = math.log(1e-3)
"""Nats; what is less likely counts as no likelier than this, so that no single turn can earn without bound."""
Told: TypeAlias = "Awaitable[dict[str, float] | None]"
"""Numbers by span, or None where nobody knows the right answer."""


def progress(policy: Policy, role: str = "questioner") -> Callable[[Episode], Told]:
    """A reward: for each question the rise of the log-probability (nats, floored) of the right conclusion."""

    async def reward(episode: Episode) -> dict[str, float] | None:
        calls, bases = _stops(policy, episode, role)
        found = await _beliefs(policy, bases, _gold(episode))
        if found is None:
            return None
        floored = [max(FLOOR, value) for value in found]
        return {call.span_id: after - before for call, before, after in zip(calls, floored, floored[1:], strict=False)}

    return reward


def counterfactual(policy: Policy, role: str = "questioner") -> Callable[[Episode], Told]:
    """For each question, and whatever was said until the next: probability of the right conclusion after the whole dialogue, less that
    without this part of it.
    """

    async def reward(episode: Episode) -> dict[str, float] | None:
        calls, bases = _stops(policy, episode, role)
        cuts = [bases[-1], *(left_out(bases, place) for place in range(len(bases) - 1))]
        found = await _beliefs(policy, cuts, _gold(episode))
        if found is None:
            return None
        whole, *without = map(math.exp, found)
        worth = {call.span_id: whole - value for call, value in zip(calls, without, strict=False)}
        return {call.span_id: worth[span] for call, span in _parts(episode, role) if span in worth}

    return reward


def left_out(bases: Sequence[Ids], place: int) -> Ids:
    """The last of some growing prompts without what was added between two of them."""
    return bases[place] + bases[-1][len(bases[place + 1]) :]


def _parts(episode: Episode, role: str) -> Iterator[tuple[PolicyCall, str]]:
    """Each call and the span of the role's call that it is, or that it follows."""
    span = ""
    for call in episode.calls():
        span = call.span_id if call.role == role and not call.failed else span
        yield call, span


def _stops(policy: Policy, episode: Episode, role: str) -> tuple[list[PolicyCall], list[Ids]]:
    """The role's calls and the ids before each, without those that force a kind of action. Raises ValueError where they do not grow."""
    calls = [call for call in episode.calls() if call.role == role and not call.failed]
    forced = (policy.codec.force("look"), policy.codec.force("conclude"))
    bases = [_unforced(call.prompt_ids, forced) for call in calls]
    for before, after in pairwise(bases):
        if after[: len(before)] != before:
            told = f"episode {episode.start.episode_id}: the prompts of {role!r} do not grow one from another"
            raise ValueError(f"{told}; hindsight leaves out what stands between two of them, and needs one unbroken stream")
    if calls and calls[-1].images:
        raise ValueError(f"hindsight reads words alone, but {role!r} was shown pictures in episode {episode.start.episode_id}")
    return calls, bases


def _unforced(ids: Ids, forced: Sequence[Ids]) -> Ids:
    return next((ids[: -len(one)] for one in forced if ids[-len(one) :] == one), ids)


def _gold(episode: Episode) -> str | None:
    start = episode.start
    return None if start.gold is None else start.choices[start.gold]


async def _beliefs(policy: Policy, bases: Sequence[Ids], answer: str | None) -> list[float] | None:
    """Nats, one a prompt. Raises BackendError, CodecError."""
    if answer is None or not bases:
        return None
    force, said = policy.codec.force("conclude"), policy.codec.action_ids(Conclude(answer))
    ids, plain = said[len(force) :], Sampling(temperature=1.0, stop_ids=policy.codec.stop_ids)
    scores = await asyncio.gather(*(policy.backend.score(Prompt((*base, *force)), ids, plain) for base in bases))
    return [math.fsum(score) for score in scores]
