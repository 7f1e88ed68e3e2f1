"""What an iteration came to: a line of ``metrics.jsonl`` in the run, which ``monologue view`` draws as curves, and a bar in the terminal.

The lines are also what a resumed run knows of its past (``read``): lines of iterations that will be repeated are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

FILE = "metrics.jsonl"
SHOWN = ("reward", "score", "kl", "entropy", "turns", "clipped", "examined")


class Report:
    """Lines on disk and a bar; silent where standard error is no terminal."""

    def __init__(self, run: Path, total: int, main: bool = True) -> None:
        """``main`` is False in processes that do not write."""
        self._file, self._total, self._main = run / FILE, total, main
        self.history: list[dict[str, Any]] = []
        """Lines so far, oldest first."""
        console = Console(stderr=True)
        columns = (TextColumn("reinforce"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Progress(*columns, console=console, disable=not (main and console.is_terminal))

    def read(self, iterations: int) -> None:
        """Takes up the lines of the first so many iterations and drops the rest."""
        text = self._file.read_text() if self._file.is_file() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        self.history = [line for line in found if line["step"] < iterations]
        if self._main and text:
            self._file.write_text("".join(json.dumps(line) + "\n" for line in self.history))

    def add(self, facts: Mapping[str, Any]) -> None:
        """One iteration; ``facts["step"]`` is its number."""
        self.history.append(dict(facts))
        if self._main:
            with self._file.open("a") as file:
                file.write(json.dumps(facts) + "\n")
        told = ", ".join(f"{name} {facts[name]:.3g}" for name in SHOWN if isinstance(facts.get(name), float))
        self._bar.update(self._task, completed=facts["step"] + 1, note=told)

    def __enter__(self) -> Report:
        self._task = self._bar.add_task("", total=self._total, completed=len(self.history), note="")
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
