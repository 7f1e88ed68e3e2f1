"""A play as it happens, in the terminal: the problem, the picture, each turn when its span ends, then the verdict.

It listens to the run's own pen, so what is shown is what was just written. Made for one episode at a time.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from monologue.traces.images import decode
from monologue.traces.schema import Annotation, EpisodeEnd, EpisodeStart, Record, SpanRecord
from monologue.traces.terminal import half_blocks, head, pictures_of, thoughts, turn, verdict


class Live:
    """Prints the records of a run as they are written."""

    def __init__(self, run: Path, console: Console | None = None) -> None:
        self.run, self.console = run, console or Console(highlight=False)
        self._start: EpisodeStart | None = None
        self._notes: list[Annotation] = []
        self._shown: set[str] = set()

    def __call__(self, record: Record) -> None:
        """One record, printed."""
        if isinstance(record, EpisodeStart):
            self._start, self._notes, self._shown = record, [], set()
            head(record, self.console)
        elif isinstance(record, SpanRecord):
            for sha256 in pictures_of([record]):
                if sha256 not in self._shown:
                    self._shown.add(sha256)
                    file = self.run / "images" / f"{sha256}.png"
                    self.console.print(half_blocks(decode(file.read_bytes(), file.name)), end="")
            thoughts(record, self.console)
            turn(dict(record.attributes), record.kind, self.console)
        elif isinstance(record, Annotation):
            self._notes.append(record)
        elif isinstance(record, EpisodeEnd) and self._start is not None:
            verdict(self._start, record, self._notes, self.console)
            self.console.print()
