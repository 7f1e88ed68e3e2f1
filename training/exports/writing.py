"""What all exports share: rows beside the episode and calls that they came from, which of them to keep, and how files are written.

Files are written beside their name and renamed when they are whole, so nobody reads half of one. Rows stream: a file takes one batch
of memory, whatever the run's size. ``datasets`` gives the parquet its feature types, so pictures come back as pictures; it is the
only library that is needed, and only for parquet.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from monologue.traces.schema import PolicyCall
from monologue.traces.store import Episode, RunReader
from monologue.training.dataset import MissingExtra
from monologue.training.rows import KEEP, Counts, Row, rows_of

BATCH = 256
"""Rows that are held before they are written."""


class ExportError(ValueError):
    """This run, or this role of it, cannot be said in the wanted shape; the sentence says what can be done."""


@dataclass(frozen=True, slots=True)
class Told:
    """A row with what stands behind it."""

    row: Row
    """Ids, mask, log-probs."""
    calls: tuple[PolicyCall, ...]
    """One a piece of the row."""
    episode: Episode
    """Where it is from."""


@dataclass
class Report:
    """What an export has written and what it has left out."""

    files: dict[str, int] = field(default_factory=dict)
    """Lines or rows by file name."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Episodes, calls and rows that were not handed over, by cause."""


def told(reader: RunReader, role: str, keep: str, report: Report) -> Iterator[Told]:
    """The kept rows of a role, streaming, in the order of the run. Raises RunError, ExportError."""
    if keep not in KEEP:
        raise ExportError(f"which rows to keep is one of {', '.join(KEEP)}, got {keep!r}")
    for episode in reader.episodes():
        if not episode.complete:
            report.left_out[f"{role}: {'failed' if episode.end else 'unfinished'} episode"] += 1
            continue
        counts = Counts()
        calls = {call.span_id: call for call in episode.calls()}
        for row in rows_of(episode, frozenset({role}), counts):
            if KEEP[keep](row):
                yield Told(row, tuple(calls[piece.span_id] for piece in row.pieces), episode)
            else:
                report.left_out[f"{role}: row of an episode that was not solved"] += 1
        report.left_out.update({f"{role}: {cause}": number for cause, number in counts.skipped.items()})


def chosen(reader: RunReader, roles: Iterable[str] | None) -> dict[str, bool]:
    """The trainable roles of the run, or the wanted ones, and whether they see. Raises ExportError where one has not spoken."""
    found: dict[str, bool] = {}
    for call in (call for episode in reader.episodes() if episode.complete for call in episode.calls() if call.trainable):
        found[call.role] = found.get(call.role, False) or bool(call.images)
    wanted = set(found if roles is None else roles)
    absent = sorted(wanted - found.keys())
    if absent or not found:
        raise ExportError(
            f"{str(reader.path)!r} holds no trainable call of {absent[0] if absent else 'any role'!r} in an episode that ended well;"
            f" roles that it has: {', '.join(sorted(found)) or 'none'}"
        )
    return {role: found[role] for role in sorted(wanted)}


def libraries() -> tuple[Any, Any, Any]:
    """``datasets``, ``pyarrow`` and ``pyarrow.parquet``. Raises MissingExtra."""
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"a parquet file needs the library {error.name!r}; pip install 'monologue[datasets]'") from error
    return datasets, pyarrow, pyarrow.parquet


def write_parquet(path: Path, features: dict[str, Any], rows: Iterable[dict[str, Any]]) -> int:
    """Writes the rows, a batch at a time, and returns how many there were. Raises ExportError where there are none."""
    datasets, arrow, parquet = libraries()
    schema = datasets.Features(features).arrow_schema
    source, count = iter(rows), 0
    with _whole(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        while batch := list(islice(source, BATCH)):
            writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema=schema))
            count += len(batch)
        if not count:
            raise ExportError(f"nothing was left to write to {path.name}; --keep all also keeps the episodes that were not solved")
    return count


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Writes the lines and returns how many there were. Raises ExportError where there are none."""
    count = 0
    with _whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for count, line in enumerate(lines, 1):  # noqa: B007
            file.write(line + "\n")
        if not count:
            raise ExportError(f"nothing was left to write to {path.name}; --keep all also keeps the episodes that were not solved")
    return count


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to that becomes ``path`` when all went well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}; name a folder that you may write to") from error
    finally:
        partial.unlink(missing_ok=True)


def picture_file(reader: RunReader, name: str) -> dict[str, Any]:
    """A stored picture in the form in which ``datasets`` keeps one. Raises ExportError where it was removed."""
    try:
        return {"bytes": (reader.path / "images" / f"{name}.png").read_bytes(), "path": f"{name}.png"}
    except FileNotFoundError as error:
        raise ExportError(f"the run lacks the picture {name}; it was removed from {str(reader.path / 'images')!r}") from error


def origin(row: Row) -> dict[str, Any]:
    """Columns that lead back to the run."""
    return {"episode_id": row.episode_id, "stream": row.stream, "row": row.number}


def origin_features(datasets: Any) -> dict[str, Any]:
    """Types of ``origin``."""
    return {"episode_id": datasets.Value("string"), "stream": datasets.Value("string"), "row": datasets.Value("int32")}


def safe(name: str) -> str:
    """A role or stream as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
