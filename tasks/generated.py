"""What generated worlds share: families of questions that take turns, splits, problems without end. A world adds ``problem``."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import ClassVar

from monologue.tasks.base import Problem, TaskError


class Generated(ABC):
    """A world cut to some of its families; none named: the usual ones. Raises TaskError for others."""

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    known: ClassVar[Collection[str]]
    """Its families, in the order in which they take turns."""
    usual: ClassVar[Collection[str]]
    """Those of them that are asked where none is named."""

    def __init__(self, families: Sequence[str] | None = None) -> None:
        chosen = tuple(self.usual if families is None else families)
        unknown = [name for name in chosen if name not in self.known]
        if unknown or not chosen:
            raise TaskError(f"unknown question families {unknown!r}; choose from {', '.join(self.known)}")
        self.families = chosen
        self._world = self.name if chosen == tuple(self.usual) else f"{self.name}[{'+'.join(chosen)}]"

    @abstractmethod
    def problem(self, split: str, index: int, seed: int = 0) -> Problem:
        """Problem ``index`` of a split; it depends on (seed, split, family, index) only."""

    def problems(self, split: str, n: int | None = None, seed: int = 0) -> Iterator[Problem]:
        """The first ``n`` problems; endless where n is None. Families take turns. Raises TaskError."""
        if split not in self.splits:
            raise TaskError(f"unknown split {split!r} of task {self.name!r}; choose from {', '.join(self.splits)}")
        return (self.problem(split, i, seed) for i in (range(n) if n is not None else itertools.count()))
