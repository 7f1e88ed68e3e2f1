"""Rewards as plain functions of a finished episode, composed by name and weight; each lands in the trace as an annotation.

    give(run, {"format": (well_formed, 0.1), "cost": (questions, -0.02)})

A function returns one number for the whole episode, numbers by span for single turns, or None where it has nothing to say. Weights are kept
beside the values, so a run shows what it was trained on, and another mixture can be tried on an old run without playing again. The task's
own score (``exact_match``) is written by whoever plays. A judge is a function like any other: ``judged`` wraps whatever gives a number
for question, dialogue and answer. Left out: learned reward models with weights of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from monologue.traces.schema import Annotation
from monologue.traces.store import Episode, RunReader, RunWriter

Reward: TypeAlias = "Callable[[Episode], float | Mapping[str, float] | None]"
"""One number for an episode, numbers by span id, or None."""
SOURCE = "reward"


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


def judged(judge: Callable[[str, str, str | None], float]) -> Reward:
    """A reward by whoever reads: ``judge(question, dialogue, answer)``, e.g. a chat model behind a function of yours."""

    def reward(episode: Episode) -> float:
        dialogue = "\n".join(f"{call.role}: {call.output}" for call in episode.calls())
        return float(judge(episode.start.question, dialogue, episode.end.answer if episode.end else None))

    return reward


REWARDS: dict[str, Reward] = {one.__name__: one for one in (solved, concluded, well_formed, questions, tokens, repeats)}
"""Rewards that recipes name."""


def give(run: RunReader, pen: RunWriter, wanted: Mapping[str, tuple[Reward, float]]) -> int:
    """Scores every finished episode by each function and writes what it said, with the weight; returns how many annotations.

    An episode that has this name, source and weight already is passed over. Exceptions of a reward function propagate.
    """
    written = 0
    for episode in run.episodes():
        if not episode.complete:
            continue
        known = {(note.name, note.weight) for note in episode.annotations if note.source == SOURCE}
        for name, (function, weight) in wanted.items():
            value = None if (name, weight) in known else function(episode)
            for span, number in ({None: value} if isinstance(value, int | float) else dict(value or {})).items():
                pen.annotate(_note(episode.start.episode_id, span, name, float(number), weight))
                written += 1
    return written


def _note(episode: str, span: str | None, name: str, value: float, weight: float) -> Annotation:
    where = "episode" if span is None else "turn"
    facts = {"episode_id": episode, "span_id": span, "name": name, "value": value, "text": None, "weight": weight, "scope": where}
    return Annotation.model_validate({**facts, "role": None, "source": SOURCE, "created_ns": time.time_ns()})


def _kind(action: str | None) -> str | None:
    return None if action is None else json.loads(action).get("kind")
