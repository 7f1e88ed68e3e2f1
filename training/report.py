"""What an iteration came to: a line of ``metrics.jsonl`` in the run, which ``monologue view`` draws as curves, and a bar in the terminal.

The lines are also what a resumed run knows of its past (``read``): lines of iterations that will be repeated are dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monologue.traces.store import RunError

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
        """Takes up the lines of the first so many iterations and drops the rest. Raises RunError where some of the first are missing:
        running means and prices that stand nowhere else would begin anew.
        """
        text = self._file.read_text() if self._file.is_file() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        self.history = [line for line in found if line["step"] < iterations]
        if [line["step"] for line in self.history] != list(range(iterations)):
            told = f"expected a line for each of {iterations} iterations in {str(self._file)!r}, got {len(self.history)}"
            raise RunError(f"{told}; put the file back as it was, or begin anew from the last weights in another folder")
        if self._main and text:
            part = self._file.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in self.history))
            os.replace(part, self._file)

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
