"""Rows for TRL's ``SFTTrainer``, one parquet a role.

Rows of text go over exactly: TRL takes data sets that are tokenised already, and where they have ``labels`` it uses them as they are
(``ROLE.parquet``: ``input_ids``; ``labels``, the id where the loss may fall and -100 elsewhere). Train with ``max_length=None``, or
TRL cuts what is longer than 1024 ids, and ``packing=False`` to keep rows apart.

Rows with pictures cannot: TRL's vision collator makes ids of messages and pictures anew, by the checkpoint's own chat template. The
shape ``messages`` hands over what it takes, under the name ``ROLE.retokenised.parquet``; it is never chosen for you. Train it with
``assistant_only_loss=True`` and a template that marks its replies, or TRL puts the loss on the questions too.

Left out: log-probs and rewards, which ``SFTTrainer`` has no place for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from monologue.traces.store import RunReader
from monologue.training.exports.dialogue import Turn, dialogue, unsayable
from monologue.training.exports.writing import (
    ExportError,
    Report,
    Told,
    chosen,
    libraries,
    origin,
    origin_features,
    picture_file,
    safe,
    told,
    write_parquet,
)
from monologue.training.rows import Row

Shape = Literal["ids", "messages"]
IGNORED = -100
"""No loss falls on ids with this label."""


def to_trl(run: str | Path, out: str | Path, roles: Iterable[str] | None = None, keep: str = "solved", shape: Shape = "ids") -> Report:
    """Writes one file a role. Raises RunError, MissingExtra, and ExportError where a row does not fit the shape."""
    if shape not in ("ids", "messages"):
        raise ExportError(f"a shape for TRL is ids or messages, got {shape!r}")
    datasets, *_ = libraries()
    report, reader = Report(), RunReader(run)
    for role, sees in chosen(reader, roles).items():
        rows = told(reader, role, keep, report)
        examples: Iterable[dict[str, Any]]
        if shape == "ids":
            name, features, examples = f"{safe(role)}.parquet", _id_features(datasets), (_ids(one.row) for one in rows)
        else:
            name, features = f"{safe(role)}.retokenised.parquet", _message_features(datasets, sees)
            examples = _dialogues(rows, reader, report, sees)
        report.files[name] = write_parquet(Path(out) / name, features, examples)
    return report


def labels(row: Row) -> list[int]:
    """The id where the loss may fall, -100 elsewhere."""
    return [number if free else IGNORED for number, free in zip(row.ids, row.mask, strict=True)]


def _ids(row: Row) -> dict[str, Any]:
    if row.images:
        raise ExportError(
            f"rows of {row.role!r} have pictures, which TRL tokenises anew, so their ids cannot be handed over;"
            " choose other roles with --role, or --shape messages for what TRL makes of messages and pictures"
        )
    return {**origin(row), "input_ids": list(row.ids), "labels": labels(row)}


def _dialogues(rows: Iterable[Told], reader: RunReader, report: Report, sees: bool) -> Iterator[dict[str, Any]]:
    for one in rows:
        cause = unsayable(one)
        if cause is not None:
            report.left_out[f"{one.row.role}: {cause}"] += 1
            continue
        turns = dialogue(one)
        pictures = {"images": [picture_file(reader, name) for turn in turns for name in turn.pictures]} if sees else {}
        yield {**origin(one.row), "messages": [{"role": turn.role, "content": _parts(turn)} for turn in turns], **pictures}


def _parts(turn: Turn) -> list[dict[str, Any]]:
    return [*({"type": "image", "text": None} for _ in turn.pictures), {"type": "text", "text": turn.text}]


def _id_features(datasets: Any) -> dict[str, Any]:
    ids = datasets.List(datasets.Value("int32"))
    return {**origin_features(datasets), "input_ids": ids, "labels": ids}


def _message_features(datasets: Any, sees: bool) -> dict[str, Any]:
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    pictures = {"images": datasets.List(datasets.Image())} if sees else {}  # TRL takes any data set with this column for one that sees
    return {**origin_features(datasets), "messages": datasets.List(message), **pictures}
