"""From a run to training rows: one growing sequence of ids per (episode, stream), cut only where the prompt stopped growing.

A policy of T turns that is trained call by call reads its first prompt T times: O(T^2) tokens. Its stream is one sequence, so it is
one row of O(T) tokens with the loss on what was sampled. Merging is allowed on one condition only, checked id by id: the next prompt
begins with all that stood there before, prompt and sampled ids. Where it does not, a new row begins and the cause that the recorder noted
is counted. Nothing is ever decoded and encoded again (rule and reasons: notes of verl, TRL and rLLM on re-tokenisation drift).

A row speaks of ids, not of calls; ``pieces`` says which ids came from which call, so that credit per turn, log-probs of the distribution
that was really sampled, and weights versions stay with their tokens. Cutting a row at any piece changes no loss (``split``, and a test):
losses must be sums over sampled tokens divided by a count that is known before rows are cut.

Left out: padding, packing and tensors (``monologue.training.collate``), advantages (credit). No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monologue.traces.schema import Annotation, EpisodeStart, ImageRef, PolicyCall
from monologue.traces.store import Episode, RunReader


class RowError(ValueError):
    """A row that cannot be trained on as it stands."""


def same_ids(rows: Iterable[Row], own: str) -> None:
    """Raises RowError where a row speaks other ids than those of the tokenizer with the hash ``own``."""
    foreign = next((row for row in rows if row.tokenizer_hash != own), None)
    if foreign is not None:
        theirs = f"episode {foreign.episode_id} holds ids of the tokenizer {foreign.tokenizer_hash[:12]}"
        raise RowError(f"{theirs}, the model to be trained has {own[:12]}; ids of one tokenizer mean nothing to another")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one call added to a row."""

    span_id: str
    """The call's span."""
    turn: int
    """Number among the calls of its stream, from 0."""
    start: int
    """Index in the row of its first sampled id."""
    stop: int
    """Index after its last sampled id."""
    logprobs: tuple[float, ...] | None
    """Behaviour log-probs in nats, one a sampled id; None where none were recorded."""
    loss_mask: bytes
    """1 where a sampled id may be trained on."""
    weights_version: str
    """Which weights sampled."""
    temperature: float | None
    """Logits were divided by this; 0 is greedy, None: not sampled by a model."""
    top_p: float | None
    """Nucleus of the sampling."""
    top_k: int | None
    """0: off."""
    finish_reason: str
    """stop, length or abort."""
    parsed: bool
    """The reply was an action."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence."""

    episode_id: str
    """Where it is from."""
    group_id: str
    """Episodes of one problem share it."""
    sample_index: int
    """Which of the group."""
    role: str
    """The seat."""
    stream: str
    """The sequence; the role unless a graph says otherwise."""
    number: int
    """Which row of its stream, from 0; above 0 only where a prefix broke."""
    policy_id: str
    """The model across its weights versions."""
    model: str
    """Its name or folder."""
    tokenizer_hash: str
    """Same hash, same ids."""
    ids: tuple[int, ...]
    """Everything that the policy read and said, in order."""
    pieces: tuple[Piece, ...]
    """What was said, and by which weights."""
    images: tuple[ImageRef, ...]
    """Pictures in order; placeholders are indexed from the row's beginning."""
    rewards: tuple[Annotation, ...] = ()
    """What was said about the episode, this role, and these turns."""
    task: str = ""
    """Of the problem."""
    family: str = ""
    """Question family."""

    @property
    def mask(self) -> bytes:
        """1 on every id that may be trained on."""
        mask = bytearray(len(self.ids))
        for piece in self.pieces:
            mask[piece.start : piece.stop] = piece.loss_mask
        return bytes(mask)

    @property
    def logprobs(self) -> tuple[float, ...] | None:
        """Behaviour log-probs over the row, 0.0 outside of what was sampled; None where a piece has none."""
        values = [0.0] * len(self.ids)
        for piece in self.pieces:
            if piece.logprobs is None:
                return None
            values[piece.start : piece.stop] = piece.logprobs
        return tuple(values)

    def reward(self, name: str) -> float | None:
        """The latest value under this name for the whole episode or this role; None where there is none."""
        found = [note.value for note in self.rewards if note.name == name and note.span_id is None and note.value is not None]
        return found[-1] if found else None


@dataclass
class Counts:
    """What a pass over a run has met."""

    episodes: int = 0
    """Episodes that gave rows."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Episodes and calls that gave none, by cause."""
    rows: int = 0
    """Rows made."""
    calls: int = 0
    """Calls in them."""
    tokens: int = 0
    """Ids in them."""
    sampled: int = 0
    """Sampled ids in them."""
    per_call: int = 0
    """Ids that one row a call would have had."""
    breaks: Counter[str] = field(default_factory=Counter)
    """Why streams were cut."""


def read_rows(
    run: str | Path | RunReader, roles: Iterable[str] | None = None, counts: Counts | None = None, merge: bool = True
) -> Iterator[Row]:
    """The rows of all episodes that ended well, streaming: only episodes under way are in memory. Calls of policies that are not
    trainable, calls that an exception left, and episodes that failed give none and are counted. ``merge=False`` gives one row a call.

    Raises RunError on a damaged run, ValueError on calls that do not fit together.
    """
    reader = run if isinstance(run, RunReader) else RunReader(run)
    counts = Counts() if counts is None else counts
    wanted = None if roles is None else frozenset(roles)
    for episode in reader.episodes():
        if not episode.complete:
            counts.skipped["failed episode" if episode.end else "unfinished episode"] += 1
            continue
        yield from rows_of(episode, wanted, counts, merge)


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Rows by problem and stream, the same whoever finished first: a run's files hold episodes as they ended, which no seed decides."""
    return sorted(rows, key=lambda row: (row.group_id, row.sample_index, row.episode_id, row.role, row.stream, row.number))


def rows_of(episode: Episode, roles: frozenset[str] | None, counts: Counts, merge: bool = True) -> Iterator[Row]:
    """The rows of one episode, stream by stream."""
    streams: dict[str, list[PolicyCall]] = {}
    for call in episode.calls():
        if roles is not None and call.role not in roles:
            continue
        if not call.trainable:
            counts.skipped["call of a policy that is not trainable"] += 1
            continue
        if call.failed:
            counts.skipped["call that an exception left"] += 1
            continue
        streams.setdefault(call.stream, []).append(call)
    counts.episodes += bool(streams)
    for calls in streams.values():
        for number, chunk in enumerate(_chunks(calls, counts) if merge else [[call] for call in calls]):
            row = _row(episode.start, episode.annotations, chunk, number)
            counts.rows += 1
            counts.calls += len(chunk)
            counts.tokens += len(row.ids)
            counts.sampled += sum(len(call.sampled_ids) for call in chunk)
            counts.per_call += sum(len(call.prompt_ids) + len(call.sampled_ids) for call in chunk)
            yield row


def _chunks(calls: Sequence[PolicyCall], counts: Counts) -> Iterator[list[PolicyCall]]:
    """Consecutive calls whose prompts extend one another, id by id."""
    chunk: list[PolicyCall] = []
    for call in calls:
        if chunk and not _extends(call, chunk[-1]):
            counts.breaks[call.prefix_break or "other"] += 1
            yield chunk
            chunk = []
        chunk.append(call)
    if chunk:
        yield chunk


def _extends(call: PolicyCall, before: PolicyCall) -> bool:
    """Same model and tokenizer, and the prompt begins with the other's prompt and reply; pictures too."""
    had, now = len(before.prompt_ids), call.prompt_ids
    same = (call.policy_id, call.model, call.tokenizer_hash) == (before.policy_id, before.model, before.tokenizer_hash)
    grown = now[:had] == before.prompt_ids and now[had : had + len(before.sampled_ids)] == before.sampled_ids
    return same and grown and call.images[: len(before.images)] == before.images


def _row(start: EpisodeStart, notes: Sequence[Annotation], calls: Sequence[PolicyCall], number: int) -> Row:
    last = calls[-1]
    spans = {call.span_id for call in calls}
    return Row(
        episode_id=start.episode_id,
        group_id=start.group_id,
        sample_index=start.sample_index,
        role=last.role,
        stream=last.stream,
        number=number,
        policy_id=last.policy_id,
        model=last.model,
        tokenizer_hash=last.tokenizer_hash,
        ids=last.prompt_ids + last.sampled_ids,
        pieces=tuple(_piece(call) for call in calls),
        images=last.images,
        rewards=tuple(note for note in notes if _concerns(note, last.role, spans)),
        task=start.task,
        family=start.family,
    )


def _concerns(note: Annotation, role: str, spans: set[str]) -> bool:
    if note.span_id is not None:
        return note.span_id in spans
    return note.role is None or note.role == role


def _piece(call: PolicyCall) -> Piece:
    start = len(call.prompt_ids)
    return Piece(
        span_id=call.span_id,
        turn=call.turn,
        start=start,
        stop=start + len(call.sampled_ids),
        logprobs=call.sampled_logprobs,
        loss_mask=call.loss_mask,
        weights_version=call.weights_version,
        temperature=call.sampling["temperature"],
        top_p=call.sampling["top_p"],
        top_k=call.sampling["top_k"],
        finish_reason=call.finish_reason,
        parsed=call.parse_error is None,
    )


def solved(row: Row) -> bool:
    """Its episode's answer was right."""
    return row.reward("exact_match") == 1.0


KEEP: dict[str, Callable[[Row], bool]] = {"all": lambda row: True, "solved": solved}
"""Names of the choices which rows to learn from or to hand over."""


def split(row: Row, after: int) -> tuple[Row, Row]:
    """The same row cut after ``after`` pieces: the first part ends there, the second reads all of it and is trained on the rest only.

    Raises ValueError where that leaves a part without pieces.
    """
    if not 0 < after < len(row.pieces):
        raise ValueError(f"expected a cut from 1 to {len(row.pieces) - 1}, got {after!r}")
    head, tail = row.pieces[:after], row.pieces[after:]
    end = head[-1].stop
    seen = tuple(image for image in row.images if image.placeholder_start < end)
    spans = {piece.span_id for piece in head}
    early = tuple(note for note in row.rewards if note.span_id is None or note.span_id in spans)
    late = tuple(note for note in row.rewards if note.span_id is None or note.span_id not in spans)
    first = replace(row, ids=row.ids[:end], pieces=head, images=seen, rewards=early)
    return first, replace(row, pieces=tail, number=row.number + 1, rewards=late)


def plain_row(row: Row) -> dict[str, Any]:
    """A row as plain lists, for tools that know no classes. Exact: ids, mask and log-probs as they are."""
    return {
        "episode_id": row.episode_id,
        "group_id": row.group_id,
        "sample_index": row.sample_index,
        "role": row.role,
        "stream": row.stream,
        "row": row.number,
        "policy_id": row.policy_id,
        "ids": list(row.ids),
        "mask": list(row.mask),
        "logprobs": None if row.logprobs is None else list(row.logprobs),
        "spans": [piece.span_id for piece in row.pieces],
        "weights_versions": [piece.weights_version for piece in row.pieces],
        "images": [image.sha256 for image in row.images],
        "rewards": {note.name: note.value for note in row.rewards if note.span_id is None and note.value is not None},
        "task": row.task,
        "family": row.family,
    }
