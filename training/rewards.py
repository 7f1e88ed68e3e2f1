"""Rewards as plain functions of a finished episode, composed by name and weight; each lands in the trace as an annotation.

    give(run, {"format": (well_formed, 0.1), "cost": (questions, -0.02)})

A function returns one number for the whole episode, numbers by span for single turns, or None where it has nothing to say. Weights are kept
beside the values, so a run shows what it was trained on, and another mixture can be tried on an old run without playing again. The task's
own score (SCORE) is written, weighted, by whoever plays. Whatever asks a model may be a coroutine function: those of many episodes are
awaited together. Such are the judges (``judges``), and ``progress``, which needs the questioner itself and is therefore brought by whoever
plays. Left out: learned reward models with weights of their own.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from inspect import isawaitable
from itertools import islice
from typing import TypeAlias

from monologue.traces.schema import Annotation
from monologue.traces.store import Episode, RunReader, RunWriter
from monologue.training.rows import RowError

Found: TypeAlias = "float | Mapping[str, float] | None"
"""One number for an episode, numbers by span id, or None."""
Reward: TypeAlias = "Callable[[Episode], Found | Awaitable[Found]]"
"""What an episode is worth."""
Wanted: TypeAlias = "Mapping[str, tuple[Reward, float]]"
"""Rewards and their weights by name."""
SOURCE = "reward"
SCORE = "exact_match"
"""The task's own score, whose weight is 1 unless a recipe gives another."""
TOGETHER = 256
"""Episodes whose rewards are awaited at once."""


def solved(episode: Episode) -> float | None:
    """1.0 where the answer is the gold choice, letter case and outer spaces aside; None where nobody knows the gold."""
    start, end = episode.start, episode.end
    if start.gold is None or end is None:
        return None
    answer = (end.answer or "").strip().lower()
    return float(answer == start.choices[start.gold].strip().lower())


def concluded(episode: Episode) -> float:
    """1.0 where an answer was given that is one of the choices: the form, right or wrong."""
    answer = (episode.end.answer or "") if episode.end else ""
    return float(answer.strip().lower() in {choice.strip().lower() for choice in episode.start.choices})


def well_formed(episode: Episode) -> dict[str, float]:
    """For each call of a policy 1.0 where its reply was an action, 0.0 where it did not parse."""
    return {call.span_id: float(call.parse_error is None) for call in episode.calls()}


def questions(episode: Episode) -> float:
    """How many questions were put to the answerer. A small negative weight is a price per question."""
    return float(sum(_kind(call.action) == "look" for call in episode.calls()))


def tokens(episode: Episode) -> float:
    """How many ids were sampled, all roles together."""
    return float(sum(len(call.sampled_ids) for call in episode.calls()))


def repeats(episode: Episode) -> float:
    """How many questions had been asked before, word for word."""
    asked = [call.output for call in episode.calls() if _kind(call.action) == "look"]
    return float(len(asked) - len(set(asked)))


def asked(episode: Episode) -> dict[str, float]:
    """1.0 at each question: with a small negative weight a price that is paid where the question is asked."""
    return {call.span_id: 1.0 for call in episode.calls() if _kind(call.action) == "look"}


def self_contained(episode: Episode) -> dict[str, float]:
    """For each question 1.0 where it can be understood by itself, 0.0 where it leans on what was said before (``dangles``)."""
    found = {}
    for call in episode.calls():
        if _kind(call.action) == "look":
            found[call.span_id] = float(not dangles(str(json.loads(call.action or "{}")["question"])))
    return found


def dangles(question: str) -> bool:
    """Whether words of a question point at something outside of it: "what colour is it?", "the same one", "and the other?".

    A pronoun may point at a noun before it in the same question ("is the dog licking its paw?"): one with "the", "a" or "an" that is no
    mere place. English only, and by words, not by grammar: "is it raining?" is taken for dangling.
    """
    words = re.findall(r"[a-z']+", question.lower())
    named = False
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word in POINTERS and not named:
            return True
        if (before, word) in ARTICLED or (not before and word in ("and", "also", "again", "instead")):
            return True
        if word in DEMONSTRATIVES and (not after or after in VERBS or after in ("one", "ones")) and not named:
            return True
        named = named or (before in ("the", "a", "an") and word not in PLACES)
    return False


POINTERS = frozenset(["it", "its", "it's", "they", "them", "their", "theirs", "he", "him", "his", "she", "her", "hers"])
DEMONSTRATIVES = frozenset(["this", "that", "these", "those"])
VERBS = frozenset(["is", "are", "was", "were", "has", "have", "had", "does", "do", "can"])
ARTICLED = frozenset(
    {("the", "same"), ("the", "other"), ("the", "others"), ("the", "one"), ("the", "ones"), ("the", "latter"), ("the", "former")}
)
PLACES = frozenset(
    [
        "left",
        "right",
        "top",
        "bottom",
        "middle",
        "centre",
        "center",
        "side",
        "front",
        "back",
        "corner",
        "picture",
        "image",
        "photo",
        "same",
        "other",
        "colour",
        "color",
        "shape",
    ]
)


REWARDS: dict[str, Reward] = {
    one.__name__: one for one in (solved, concluded, well_formed, questions, asked, tokens, repeats, self_contained)
}
"""Rewards that recipes name."""


def give(run: RunReader, pen: RunWriter, wanted: Wanted) -> int:
    """Scores every finished episode by each function and writes what it said, with the weight; returns how many annotations.

    What has been said of an episode or a call with this name and weight already is not said again; a function of single turns may be asked
    again after a crash, and what is missing is written. Exceptions of a reward function propagate. Where a function is a coroutine function
    this must be called outside of an event loop. Raises RowError for a reward that is no finite number.
    """
    written, episodes = 0, run.episodes()
    while some := list(islice(episodes, TOGETHER)):
        told = list(_told(some, wanted))
        waiting = [found for *_, found in told if isawaitable(found)]
        arrived = iter(asyncio.run(_all(waiting)) if waiting else ())
        for episode, name, weight, found in told:
            value = next(arrived) if isawaitable(found) else found
            known = _known(episode)
            for span, number in ({None: value} if isinstance(value, int | float) else dict(value or {})).items():
                if not math.isfinite(number):
                    where = f"for episode {episode.start.episode_id}"
                    raise RowError(f"expected a finite number from the reward {name!r}, got {number!r} {where}")
                if (name, weight, span) not in known:
                    pen.annotate(_note(episode.start.episode_id, span, name, float(number), weight))
                    written += 1
    return written


def _told(episodes: Iterable[Episode], wanted: Wanted) -> Iterator[tuple[Episode, str, float, Found | Awaitable[Found]]]:
    """What each function says of each finished episode of which it has not said one number for the whole."""
    for episode in episodes:
        known = _known(episode)
        for name, (function, weight) in wanted.items() if episode.complete else ():
            if (name, weight, None) not in known:
                yield episode, name, weight, function(episode)


def _known(episode: Episode) -> set[tuple[str, float, str | None]]:
    """What was said before."""
    return {(note.name, note.weight, note.span_id) for note in episode.annotations if note.source == SOURCE}


async def _all(waiting: Sequence[Awaitable[Found]]) -> list[Found]:
    return await asyncio.gather(*waiting)


def _note(episode: str, span: str | None, name: str, value: float, weight: float) -> Annotation:
    where = "episode" if span is None else "turn"
    facts = {"episode_id": episode, "span_id": span, "name": name, "value": value, "text": None, "weight": weight, "scope": where}
    return Annotation.model_validate({**facts, "role": None, "source": SOURCE, "created_ns": time.time_ns()})


def _kind(action: str | None) -> str | None:
    return None if action is None else json.loads(action).get("kind")
