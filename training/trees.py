"""Rows of one problem begin alike; here they share one line of a batch, so that what they share is read once.

    rows    question A1    question A2    question A3          three times the question (and its pictures)
    line    question | A1 | A2 | A3                            once; each branch sees the question and itself, at its own positions

A mask keeps branches from one another, so every id is predicted from exactly what it was predicted from in a row of its own; loss and
gradient are the same up to rounding (a test holds both). Groups of G episodes read 1/G of their openings (compare "Tree Training",
arXiv 2511.00413). Only the beginning that stood before anything was sampled is shared. Needs attention that takes such a mask: ``sdpa``.

Shapes: B lines, L padded length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monologue.training.rows import Row

LEAST = 4
"""Ids that must be shared for it to be worth a line."""


@dataclass(frozen=True, slots=True)
class Line:
    """Some rows behind what they share."""

    rows: tuple[int, ...]
    """Their numbers."""
    shared: int
    """Ids at the beginning that stand there once; 0 for a row by itself."""


def lines(rows: Sequence[Row]) -> list[Line]:
    """The rows as lines: those of one problem and stream that were shown the same pictures, behind the longest beginning of all of them."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        pictures = tuple((image.sha256, image.placeholder_start) for image in row.images)
        alike[row.group_id, row.stream, pictures].append(place)
    found = []
    for places in alike.values():
        shared = _common([rows[place] for place in places]) if len(places) > 1 else 0
        if shared >= LEAST:
            found.append(Line(tuple(places), shared))
        else:
            found += [Line((place,), 0) for place in places]
    return found


def parts(line: Line, rows: Sequence[Row]) -> Iterator[tuple[int, int, int, int]]:
    """What a line is made of, in order: row, branch (0 is what all share), first id of the row, the id after the last."""
    if line.shared:
        yield line.rows[0], 0, 0, line.shared
    for branch, place in enumerate(line.rows, start=1):
        yield place, branch, line.shared, len(rows[place].ids)


def _common(rows: Sequence[Row]) -> int:
    """How many leading ids all rows have before anything was sampled, pictures whole; 0 where a picture came later."""
    openings = [row.ids[: row.pieces[0].start] for row in rows]
    shared = next((place for place, ids in enumerate(zip(*openings, strict=False)) if len(set(ids)) > 1), min(map(len, openings)))
    ends = max((image.placeholder_start + image.placeholder_count for image in rows[0].images), default=0)
    return shared if ends <= shared else 0


def mask(branches: Tensor) -> Tensor:
    """(B, 1, L, L) what each place may look at, from the number of each place's branch (B, L): 0 what is shared, -1 padding."""
    length = branches.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    same = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])  # (B, L, L)
    return (same & before)[:, None]
