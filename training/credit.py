"""From rewards to advantages: what each turn of each role is to be praised or blamed for.

A reward is an annotation with a value and a weight; all that was said about an episode, a role or a turn counts, the last under each name.
An advantage is a reward compared with what else the same problem earned. The comparison is made between *episodes*, never between turns or
rows: where each turn counts as a member of its group, a policy that asks less is praised for it (agent-lightning issue 489).

    team       the episode's reward and whatever else the role was given, for all its turns alike
    per_role   share * the episode's + (1 - share) * the role's own
    turn       what was earned from this turn on (discounted), compared among the turns with this number
    counterfactual   by how much a question made the right outcome likelier, and its turn's rewards; elsewhere as ``team``

The baseline leaves the episode itself out: A_i = R_i - mean of the others = G/(G-1) (R_i - mean), unbiased, no division by the standard
deviation (RLOO, Ahmadian et al. 2024). Groups are of one problem, one role *and* one weights version. An episode without a sibling is
compared with a running mean of its role's rewards (RAE, SPIRAL 2025): a raw reward is never taken for an advantage, as verl's GRPO does
in silence.

``counterfactual`` compares a question with its own absence (``agents.hindsight`` tells, the trace holds it as COUNTERFACTUAL), so it has no
other baseline: a question that changes nothing is neither praised nor blamed. Rewards of whole episodes reach only what ends them there;
a price per question is then to be paid at the question (``asked``).

Left out: division by the standard deviation (it weighs hard and easy problems alike, and is biased), trees of branches (AT-GRPO).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from monologue.traces.codes import pack_floats
from monologue.traces.schema import Annotation
from monologue.traces.store import RunWriter
from monologue.training.rows import Row, RowError

Kind = Literal["team", "per_role", "turn", "counterfactual"]
NAME = "advantage"
COUNTERFACTUAL = "counterfactual"
"""Annotation of a call: probability of the right conclusion with it, less that without it."""
DECAY = 0.95
Key = tuple[object, ...]


@dataclass
class Credit:
    """Advantages of some rows."""

    advantages: dict[str, float]
    """By span."""
    groups: int
    """Groups with more than one member."""
    flat: int
    """Those of them in which everyone earned the same: nothing to learn from."""
    alone: int
    """Members without a sibling."""


@dataclass
class Averages:
    """Running mean of each role's rewards, for episodes without siblings."""

    means: dict[str, float] = field(default_factory=dict)

    def advantage(self, role: str, reward: float) -> float:
        """Compared with what was before, then remembered; the first reward of a role teaches nothing."""
        before = self.means.get(role, reward)
        self.means[role] = DECAY * before + (1 - DECAY) * reward
        return reward - before


def assign(
    rows: Sequence[Row], kind: Kind = "team", *, share: float = 1.0, discount: float = 1.0, averages: Averages | None = None
) -> Credit:
    """Advantages of every call in ``rows``, which hold whole episodes. ``share`` is of ``per_role``, ``discount`` (per turn) of ``turn``.

    Raises ValueError for options that a kind of credit does not know, RowError for an episode without any reward.
    """
    if kind != "per_role" and share != 1.0:
        raise ValueError(f"share belongs to credit 'per_role', got share={share!r} with {kind!r}")
    if kind != "turn" and discount != 1.0:
        raise ValueError(f"discount belongs to credit 'turn', got discount={discount!r} with {kind!r}")
    averages = Averages() if averages is None else averages
    earned = _earned(rows, kind, share, discount)
    groups: dict[Key, dict[Key, float]] = defaultdict(dict)
    for one in earned:
        groups[one.group][one.member] = one.reward
    found: dict[str, float] = {}
    told: dict[tuple[Key, Key], float] = {}
    for one in earned:
        place = one.group, one.member
        if place not in told:
            others = [reward for member, reward in groups[one.group].items() if member != one.member]
            told[place] = one.reward - math.fsum(others) / len(others) if others else averages.advantage(one.role, one.reward)
        found[one.span_id] = told[place]
    if kind == "counterfactual":
        found |= _against_absence(rows)
    shared = [list(group.values()) for group in groups.values() if len(group) > 1]
    flat = sum(max(values) == min(values) for values in shared)
    return Credit(found, len(shared), flat, sum(len(group) == 1 for group in groups.values()))


@dataclass(frozen=True, slots=True)
class _Earned:
    """What one call is held to have earned, and with whom it is compared."""

    span_id: str
    role: str
    group: Key
    member: Key
    reward: float


def _earned(rows: Sequence[Row], kind: Kind, share: float, discount: float) -> list[_Earned]:
    seats: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        seats[row.episode_id, row.role].append(row)
    found = []
    for (episode, role), own in seats.items():
        notes = rewards(note for row in own for note in row.rewards)
        if not notes:
            raise RowError(f"expected a reward of episode {episode}, got none; score the run first ('monologue play' does)")
        whole = _sum(note for note in notes if note.scope == "episode")
        rest = _sum(note for note in notes if note.scope != "episode")
        group: Key = (own[0].group_id, own[0].pieces[0].weights_version, role)
        if kind == "turn":
            ended = whole + _sum(note for note in notes if note.scope == "role")
            found += _to_go(own, notes, ended, discount, group)
        else:
            reward = share * whole + (1 - share) * rest if kind == "per_role" else whole + rest
            found += [_Earned(piece.span_id, role, group, (episode,), reward) for row in own for piece in row.pieces]
    return found


def _against_absence(rows: Sequence[Row]) -> dict[str, float]:
    """Of each call that was left out once: what that cost, and its turn's rewards. Raises ValueError where nobody has tried."""
    found = {}
    for row in rows:
        tried = {note.span_id: note.value or 0.0 for note in row.rewards if note.name == COUNTERFACTUAL}
        notes = rewards(row.rewards)
        for span in (piece.span_id for piece in row.pieces if piece.span_id in tried):
            found[span] = tried[span] + _sum(note for note in notes if note.span_id == span)
    if not found and any(len(row.pieces) > 1 for row in rows):
        raise RowError(
            f"credit {COUNTERFACTUAL!r} expected notes of that name, got none: nobody has left out a question; whoever plays by a recipe "
            "with this credit writes them, for other runs see monologue.agents.hindsight"
        )
    return found


def _to_go(rows: Sequence[Row], notes: Sequence[Annotation], ended: float, discount: float, group: Key) -> list[_Earned]:
    """What each turn of one seat has earned from there on: ``ended`` at the last turn of each stream, turn rewards on the way."""
    found = []
    for stream in {row.stream: None for row in rows}:
        reward, calls = ended, sorted((piece.turn, piece.span_id) for row in rows if row.stream == stream for piece in row.pieces)
        for place, (turn, span) in enumerate(reversed(calls)):
            reward = reward * (discount if place else 1.0) + _sum(note for note in notes if note.span_id == span)
            found.append(_Earned(span, rows[0].role, (*group, turn), (rows[0].episode_id, stream), reward))
    return found


def at_turns(rows: Sequence[Row]) -> dict[str, float]:
    """What was earned at each call, by span: its turn's rewards, and at a stream's last call those of episode and role."""
    found = {piece.span_id: _sum(n for n in rewards(row.rewards) if n.span_id == piece.span_id) for row in rows for piece in row.pieces}
    last = {(row.episode_id, row.stream): row for row in rows}
    for row in last.values():
        found[row.pieces[-1].span_id] += _sum(note for note in rewards(row.rewards) if note.span_id is None)
    return found


def rewards(notes: Iterable[Annotation]) -> list[Annotation]:
    """The last annotation of each name, source and place that has a value and a weight; what is only told has none."""
    last = {
        (note.name, note.source, note.scope, note.span_id, note.role): note
        for note in notes
        if note.value is not None and note.weight and note.scope != "token"
    }
    return list(last.values())


def _sum(notes: Iterable[Annotation]) -> float:
    return math.fsum(note.weight * (note.value or 0.0) for note in notes)


def write(run: RunWriter, rows: Sequence[Row], advantages: Mapping[str, float | Sequence[float]], source: str) -> None:
    """Appends each call's advantage to the run, one number or one a sampled id, where the page shows it; calls that have one already are
    passed over.
    """
    for row in rows:
        known = {note.span_id for note in row.rewards if note.name == NAME}
        for piece in row.pieces:
            if piece.span_id in advantages and piece.span_id not in known:
                value = advantages[piece.span_id]
                one = isinstance(value, int | float)
                said = {"value": value, "values": None} if one else {"value": None, "values": pack_floats(value)}  # type: ignore[arg-type]
                note = {"episode_id": row.episode_id, "span_id": piece.span_id, "name": NAME, "text": None, "weight": 0.0, "role": row.role}
                place = {"scope": "turn" if one else "token", "source": source, "created_ns": time.time_ns()}
                run.annotate(Annotation.model_validate({**note, **said, **place}))
