"""A task is a named set of problems and the rule that scores an answer; every figure comes with its standard error.

A problem carries its pictures lazily: a rendered or opened picture exists only while somebody looks at it, so a list of a million
problems costs kilobytes each. Pictures come as functions rather than as files, since our own world draws them from a seed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL.Image import Image


class TaskError(Exception):
    """A task cannot be found or its data cannot be read."""


@dataclass(frozen=True, slots=True)
class OracleTurn:
    """One question of a monologue that leads to the answer, with the true reply."""

    question: str
    reply: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question about pictures with fixed choices."""

    id: str
    """Stable across runs: ``task/split/index``."""
    task: str
    question: str
    choices: tuple[str, ...]
    gold: int | None
    """Index into choices; None for a user's own question."""
    pictures: tuple[Callable[[], Image], ...]
    """Each call gives the same RGB picture."""
    family: str = ""
    hops: int | None = None
    """Look-ups that the program needs."""
    program: tuple[tuple[str, ...], ...] = ()
    oracle: tuple[OracleTurn, ...] | None = None
    explanation: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A named set of problems and its scorer."""

    @property
    def name(self) -> str: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def problems(self, split: str, n: int | None = None, seed: int = 0) -> Iterator[Problem]:
        """The first ``n`` problems of a split (None: all, endless for generated splits). Raises TaskError."""
        ...

    def score(self, problem: Problem, answer: str | None) -> float:
        """1.0 right, 0.0 wrong; None (no answer was given) is wrong."""
        ...


def taken(task: Task, split: str, n: int | None = None) -> list[Problem]:
    """The first ``n`` problems of a split, at least one. Raises TaskError."""
    found = list(task.problems(split, n, 0))
    if not found:
        raise TaskError(f"expected problems in the split {split!r} of task {task.name!r}, found none")
    return found


def exact_match(problem: Problem, answer: str | None) -> float:
    """1.0 when the answer is the gold choice, letter case and outer spaces aside."""
    if problem.gold is None:
        raise TaskError(f"problem {problem.id!r} has no gold answer, so it cannot be scored")
    return float(answer is not None and answer.strip().lower() == problem.choices[problem.gold].strip().lower())


@dataclass(frozen=True, slots=True)
class Score:
    """An accuracy with its standard error and the analytic chance of a guesser."""

    n: int
    accuracy: float
    stderr: float | None
    """None where one problem says nothing about the spread."""
    chance: float

    def __str__(self) -> str:
        error = "no error bar at n = 1" if self.stderr is None else f"{self.stderr:.3f}"
        return f"{self.accuracy:.3f} ± {error}"


def summarize(scores: Sequence[float], chances: Sequence[float]) -> Score:
    """Mean, standard error of the mean (binomial form, s / sqrt(n)), mean chance. Raises ValueError on no scores."""
    if not scores:
        raise ValueError("no scores to summarize; expected at least one")
    n = len(scores)
    mean = math.fsum(scores) / n
    spread = math.fsum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else None
    return Score(n, mean, None if spread is None else math.sqrt(spread / n), math.fsum(chances) / n)


def by_family(problems: Sequence[Problem], scores: Sequence[float]) -> dict[str, Score]:
    """One Score per question family, in name order."""
    return _grouped([problem.family for problem in problems], problems, scores)


def by_hops(problems: Sequence[Problem], scores: Sequence[float]) -> dict[str, Score]:
    """One Score per number of look-ups, and ``multi`` over all that need two or more; problems of unknown hops are left out."""
    known = [(problem, score) for problem, score in zip(problems, scores, strict=True) if problem.hops is not None]
    many = [(problem, score) for problem, score in known if (problem.hops or 0) > 1]
    both = [(str(problem.hops), problem, score) for problem, score in known] + [("multi", problem, score) for problem, score in many]
    return _grouped(*map(list, zip(*both, strict=True))) if both else {}


def _grouped(keys: Sequence[str], problems: Sequence[Problem], scores: Sequence[float]) -> dict[str, Score]:
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key, problem, score in zip(keys, problems, scores, strict=True):
        groups[key].append((score, 1 / len(problem.choices)))
    return {key: summarize(*zip(*rows, strict=True)) for key, rows in sorted(groups.items())}
