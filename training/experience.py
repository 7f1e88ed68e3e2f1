"""From the rows of a batch to what a step is made of: each row with a coefficient for every sampled id.

    rows ── forward pass without gradient ──► old log-probs, entropies, values ── gate ── credit ── objective ──► lessons ──► micro-batches

Everything that speaks of the whole batch (baselines, whitening, ratios of whole sequences, the count that losses are divided by) is settled
here, before rows are dealt out to steps, micro-batches and processes. So none of those changes the sum of the gradients. Rows whose
coefficients are all zero are counted and then left out: they would be read for nothing.

Replies that were cut off at the length limit are no action of the policy's; unless asked for, their ids carry no loss (as in DAPO).

Shapes: n sampled ids of a row, S of all rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from monologue.training.collate import Batch, Collate
from monologue.training.gate import GateError, gate
from monologue.training.objectives import Base, Experience, Part
from monologue.training.rows import Row

Pass = Callable[[Batch], tuple[Tensor, ...]]
"""A forward pass without gradient: some (S,) tensors."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A row and what is to be learned from it."""

    role: str
    """Whose."""
    row: Row
    """What was said."""
    part: Part
    """Coefficients and facts of its n sampled ids."""

    @property
    def idle(self) -> bool:
        """Nothing of it moves the policy, a KL penalty and a critic aside."""
        return not bool(self.part.coefficients.any())


@dataclass(frozen=True, slots=True)
class Micro:
    """A micro-batch of one role."""

    role: str
    batch: Batch
    part: Part
    count: float
    """Trained ids of this role in the whole step, all micro-batches and processes together."""


def over(rows: Sequence[Row], collate: Collate, run: Pass, size: int) -> list[list[Tensor]]:
    """Each tensor that ``run`` gives, cut by rows: for each output a list of (n,) float64 tensors on the CPU, in the order of the rows."""
    order = sorted(range(len(rows)), key=lambda place: 0 if collate.trees else len(rows[place].ids))  # like lengths: less padding
    found: list[list[Tensor]] = []
    for start in range(0, len(order), size):
        places = order[start : start + size]
        with torch.no_grad():
            outputs = run(collate([rows[place] for place in places]))
        found = found or [[torch.empty(0)] * len(rows) for _ in outputs]
        for kept, values in zip(found, outputs, strict=True):
            lengths = [_sampled(rows[place]) for place in places]
            for place, part in zip(places, torch.split(values.double().cpu(), lengths), strict=True):
                kept[place] = part
    return found


def sampled(rows: Sequence[Row], version: str, count: int, seed: str) -> list[int] | None:
    """Places of the rows to be recomputed: ``count`` of those that these very weights sampled with log-probs, and all others. None: every
    row, also where ``count`` is 0.
    """
    fresh = [place for place, row in enumerate(rows) if all(p.weights_version == version and p.logprobs is not None for p in row.pieces)]
    if not 0 < count < len(fresh):
        return None
    spared = set(fresh) - set(random.Random(seed).sample(fresh, count))
    return [place for place in range(len(rows)) if place not in spared]


def recorded(row: Row) -> Tensor:
    """(n,) log-probs of a row's sampled ids as they stand in the trace."""
    return torch.tensor([value for piece in row.pieces for value in piece.logprobs or ()], dtype=torch.float64)


def lessons(
    role: str,
    rows: Sequence[Row],
    objective: Base,
    advantages: Mapping[str, float],
    rewards: Mapping[str, float],
    seen: Mapping[str, Sequence[Tensor]],
    version: str,
    penalty: float,
    tolerance: float,
    truncated: bool = False,
    checked: Sequence[int] | None = None,
) -> tuple[list[Lesson], dict[str, float]]:
    """``rows`` stand stream by stream. ``seen`` holds what the forward passes gave, (n,) a row: ``old``, ``entropy``, and where there are
    such ``values``, ``reference``. ``truncated`` keeps replies that were cut off. ``checked`` are the places of rows that were recomputed,
    where others' ``old`` stands as recorded (``sampled``). Returns the lessons and what was measured. Raises GateError.
    """
    facts: dict[str, float] = {}
    proven = range(len(rows)) if checked is None else checked
    if objective.ratios:
        compared, facts["drift"] = gate([rows[place] for place in proven], [seen["old"][place] for place in proven], version, tolerance)
        facts["compared"] = float(compared)
    batch = _experience(rows, advantages, rewards, seen, version, truncated)
    if not batch.mask.any():
        cut = sum(piece.finish_reason == "length" for row in rows for piece in row.pieces)
        told = f"nothing that {role!r} said may be learned: {cut} of its {sum(len(row.pieces) for row in rows)} replies were cut off"
        raise GateError(f"{told} at the length limit; raise max_tokens, or truncated=true keeps them")
    weighed = objective.weigh(batch, penalty)
    masks = torch.split(batch.mask, [_sampled(row) for row in rows])
    entropy = _mean(torch.cat([seen["entropy"][place] for place in proven]), torch.cat([masks[place] for place in proven]))
    facts |= {"masked": weighed.masked, "effective": weighed.effective, "entropy": entropy}
    facts["streams"] = float(batch.unit.max() + 1)
    if batch.reference is not None:
        facts["kl"] = float(((batch.old - batch.reference) * batch.mask).sum()) / facts["streams"]
    if batch.values is not None and weighed.targets is not None:
        facts["explained"] = _explained(batch.values[batch.mask > 0], weighed.targets[batch.mask > 0])
    whole = Part(weighed.coefficients, batch.old, batch.mask, batch.reference, batch.values, weighed.targets)
    lengths = [_sampled(row) for row in rows]
    return [Lesson(role, row, part) for row, part in zip(rows, _split(whole, lengths), strict=True)], facts


def spread(found: Sequence[Lesson]) -> dict[str, list[float]]:
    """The coefficients of each call's sampled ids, by span."""
    told, lengths = {}, [piece.stop - piece.start for lesson in found for piece in lesson.row.pieces]
    spans = [piece.span_id for lesson in found for piece in lesson.row.pieces]
    values = [value for lesson in found for value in lesson.part.coefficients.tolist()]
    for span, length in zip(spans, lengths, strict=True):
        told[span], values = values[:length], values[length:]
    return told


def _experience(
    rows: Sequence[Row],
    advantages: Mapping[str, float],
    rewards: Mapping[str, float],
    seen: Mapping[str, Sequence[Tensor]],
    version: str,
    truncated: bool,
) -> Experience:
    columns: list[tuple[float, float, float, float, float, float]] = []
    streams: dict[tuple[str, str], int] = {}
    for row in rows:
        unit = streams.setdefault((row.episode_id, row.stream), len(streams))
        for piece in row.pieces:
            fresh, whole = piece.weights_version == version, truncated or piece.finish_reason != "length"
            said = piece.logprobs or (math.nan,) * (piece.stop - piece.start)
            for place, (value, free) in enumerate(zip(said, piece.loss_mask, strict=True)):
                ends = place == len(said) - 1
                earned = rewards.get(piece.span_id, 0.0) if ends else 0.0
                columns.append((advantages.get(piece.span_id, 0.0), earned, float(free and whole), unit, value, fresh))
    table = torch.tensor(columns, dtype=torch.float64)  # (S, 6)
    return Experience(
        advantages=table[:, 0],
        rewards=table[:, 1],
        mask=table[:, 2],
        unit=table[:, 3].long(),
        behaviour=table[:, 4],
        old=torch.cat(list(seen["old"])),
        fresh=table[:, 5] > 0,
        values=torch.cat(list(seen["values"])) if "values" in seen else None,
        reference=torch.cat(list(seen["reference"])) if "reference" in seen else None,
    )


def deal(
    found: Sequence[Lesson],
    collate: Mapping[str, Collate],
    minibatches: int,
    micro: int,
    share: tuple[int, int],
    seed: str,
    whole: bool,
    roles: Sequence[str],
) -> Iterator[Micro]:
    """One pass over the lessons: ``minibatches`` steps, in each ``micro`` micro-batches for each of ``roles`` and every process. ``share``
    is this process's number and how many there are; ``whole`` keeps idle rows. Every process deals the same cards from the same seed. In
    place of a role that said nothing another's row is read for nothing, so that a step has as many micro-batches as ever.
    """
    rank, world = share
    mixed = random.Random(seed).sample(list(found), len(found))
    said = {lesson.role for lesson in mixed}
    for step in range(minibatches):
        for wanted in sorted(roles):
            role = wanted if wanted in said else mixed[0].role
            mine = [lesson for lesson in mixed if lesson.role == role][step::minibatches]
            count = sum(float(lesson.part.mask.sum()) for lesson in mine)
            live = [lesson for lesson in mine if role == wanted and (whole or not lesson.idle)]
            for number in range(micro):
                hand = live[rank + world * number :: world * micro] or [
                    _emptied(next(lesson for lesson in [*mine, *mixed] if lesson.role == role))
                ]
                parts = [lesson.part for lesson in hand]
                yield Micro(role, collate[role]([lesson.row for lesson in hand]), _join(parts), max(count, 1.0))


def _emptied(lesson: Lesson) -> Lesson:
    """A row to be read for nothing, where a process has no other: all take part in every step."""
    part = lesson.part
    return replace(lesson, part=replace(part, coefficients=torch.zeros_like(part.coefficients), mask=torch.zeros_like(part.mask)))


def _sampled(row: Row) -> int:
    return sum(piece.stop - piece.start for piece in row.pieces)


_FIELDS = ("coefficients", "old", "mask", "reference", "values", "targets")


def _split(whole: Part, lengths: Sequence[int]) -> list[Part]:
    columns: list[Any] = [getattr(whole, name) for name in _FIELDS]
    cut = [[None] * len(lengths) if column is None else torch.split(column, list(lengths)) for column in columns]
    return [Part(*fields) for fields in zip(*cut, strict=True)]


def _join(parts: Sequence[Part]) -> Part:
    columns: list[Any] = [[getattr(part, name) for part in parts] for name in _FIELDS]
    joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    return Part(*joined)


def _mean(values: Tensor, mask: Tensor) -> float:
    return float((values * mask).sum() / mask.sum().clamp(min=1))


def _explained(values: Tensor, targets: Tensor) -> float:
    """Share of the targets' variance that the critic explains; 0.0 where there is none."""
    spread = float(targets.var(correction=0))
    return 1 - float((targets - values).var(correction=0)) / spread if spread > 0 else 0.0
