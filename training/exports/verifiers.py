"""A run as verifiers' v1 traces: one JSON line a (episode, stream), exact, pictures included.

A trace there is a graph of messages in which each node holds the ids that it adds, so ids go over as the deltas that they are here:
what a call heard goes to the last message before its reply (the border between messages is not known, and nothing falls on it: no
loss, no log-prob), what it sampled to the reply's own node. Where a prompt stopped growing a new root begins, so a branch of the trace
is a row, id by id. Log-probs keep every digit; verifiers' own ``to_record`` would round them to four.

A sampled id that must not be trained has no log-prob in that format; where a call has such ids, all its log-probs stand in
``info.monologue`` too, with the weights, notes and span ids of each call. A call without log-probs is refused: there it would read as 0.

Left out: semantic edges between agents, credit (``advantages``), and whatever verifiers times that a run does not record.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from monologue.traces.schema import Annotation, PolicyCall
from monologue.traces.store import RunReader
from monologue.training.exports.dialogue import Turn, heard
from monologue.training.exports.writing import ExportError, Report, Told, chosen, picture_file, told, write_lines
from monologue.training.rows import Piece, Row
from monologue.version import __version__

VERSION = 1
"""Of verifiers' trace schema."""
IMAGE = 1
"""Its mark of a picture's placeholder."""


def to_verifiers(run: str | Path, out: str | Path, roles: Iterable[str] | None = None, keep: str = "all") -> Report:
    """Writes ``traces.jsonl``. Raises RunError, ExportError."""
    report, reader = Report(), RunReader(run)
    seats = chosen(reader, roles)
    report.files["traces.jsonl"] = write_lines(Path(out) / "traces.jsonl", _lines(reader, seats, keep, report))
    return report


def _lines(reader: RunReader, seats: Iterable[str], keep: str, report: Report) -> Iterator[str]:
    for role in seats:
        for _, rows in groupby(told(reader, role, keep, report), lambda one: (one.row.episode_id, one.row.stream)):
            yield _dump(trace(list(rows), reader))


def _dump(value: dict[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ExportError(f"trace {value['id']} holds a number that JSON cannot say ({error}); mend the reward or log-prob") from error


def trace(rows: Sequence[Told], reader: RunReader) -> dict[str, Any]:
    """The rows of one stream of one episode as a trace."""
    first = rows[0]
    start, end, row = first.episode.start, first.episode.end, first.row
    assert end is not None
    spans = {span.span_id: (span.start_ns / 1e9, span.end_ns / 1e9) for span in first.episode.spans}
    nodes: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for one in rows:
        _add(one, reader, spans, nodes, calls, turns)
    notes = [note for note in row.rewards if note.span_id is None]
    facts = {"answer": None if start.gold is None else start.choices[start.gold], "choices": list(start.choices), "family": start.family}
    return {
        "version": VERSION,
        "id": f"{row.episode_id}/{row.role}/{row.stream}",
        "verifiers": {"version": f"none; written by monologue {__version__}"},
        "task": {"type": start.task, "key": start.problem_id, "data": {"id": start.problem_id, "prompt": start.question, **facts}},
        "agent": {"config": {"model": row.model}, "name": row.role, "trainable": True},
        "nodes": nodes,
        "calls": calls,
        "mm_token_type_id_map": _placeholders([one.row for one in rows]),
        "rewards": {note.name: {"score": note.value, "weight": note.weight} for note in notes if note.value is not None},
        "info": {"monologue": {**_origin(row), "turns": turns, "notes": [_note(note) for note in notes]}},
        "is_completed": True,
        "ok": True,
        "stop_condition": "agent_completed",
        "timing": {"start": start.started_ns / 1e9, "agent": {"start": start.started_ns / 1e9, "end": end.ended_ns / 1e9}},
    }


def _add(
    one: Told,
    reader: RunReader,
    spans: dict[str, tuple[float, float]],
    nodes: list[dict[str, Any]],
    calls: list[dict[str, Any]],
    turns: list[dict[str, Any]],
) -> None:
    """A row as a path of nodes from a new root."""
    parent: int | None = None
    at, before = 0, ""
    for piece, call in zip(one.row.pieces, one.calls, strict=True):
        began, ended = spans[call.span_id]
        new = one.row.ids[at : piece.start]
        messages = [_message(turn, before, reader) for turn in heard(call)]
        for number, message in enumerate(messages, 1):
            ids = new if number == len(messages) else ()
            nodes.append(_node(parent, message, ids, bytes(len(ids)), (), began, sampled=False))
            parent = len(nodes) - 1
        ahead = () if messages else new  # a call that heard nothing new carries its scaffold itself
        free, logprobs = _trainable(piece, call)
        ids = ahead + one.row.ids[piece.start : piece.stop]
        nodes.append(_node(parent, _reply(call), ids, bytes(len(ahead)) + free, logprobs, ended, sampled=True))
        parent = len(nodes) - 1
        calls.append(_call(call, parent, began, ended))
        turns.append(_turn_facts(one, piece, call, parent))
        at, before = piece.stop, call.span_id


def _node(
    parent: int | None, message: dict[str, Any], ids: Sequence[int], mask: bytes, logprobs: Sequence[float], when: float, sampled: bool
) -> dict[str, Any]:
    return {
        "parent": parent,
        "message": message,
        "sampled": sampled,
        "timestamp": when,
        "token_ids": list(ids),
        "mask": [bool(free) for free in mask],
        "logprobs": list(logprobs),
    }


def _trainable(piece: Piece, call: PolicyCall) -> tuple[bytes, tuple[float, ...]]:
    """The mask of the sampled ids, and the log-probs where it is 1."""
    if piece.logprobs is None:
        raise ExportError(
            f"call {call.span_id} of {call.role!r} has no log-probs, which a trace would show as 0; leave this role out with --role,"
            " or hand its rows to TRL"
        )
    return piece.loss_mask, tuple(value for value, free in zip(piece.logprobs, piece.loss_mask, strict=True) if free)


def _reply(call: PolicyCall) -> dict[str, Any]:
    if call.action is None:
        return {"role": "assistant", "content": call.output}
    action = json.loads(call.action)
    kind = action.pop("kind")
    if kind == "reply":
        return {"role": "assistant", "content": action["text"]}
    name, arguments = (action["name"], action.get("arguments", {})) if kind == "tool" else (kind, action)
    return {"role": "assistant", "tool_calls": [{"id": call.span_id, "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}]}


def _message(turn: Turn, before: str, reader: RunReader) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": _url(reader, name)}} for name in turn.pictures]
    content: Any = [*pictures, {"type": "text", "text": turn.text}] if pictures else turn.text
    said = {"role": turn.role, "content": content}
    return {**said, "tool_call_id": before} if turn.role == "tool" else said


def _url(reader: RunReader, name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(picture_file(reader, name)["bytes"]).decode()


def _call(call: PolicyCall, node: int, began: float, ended: float) -> dict[str, Any]:
    cached = call.cached_tokens
    fresh = len(call.prompt_ids) - (cached or 0)
    return {
        "node": node,
        "model": call.model,
        "sampling": {name: value for name, value in call.sampling.items() if value is not None},
        "finish_reason": call.finish_reason if call.finish_reason in ("stop", "length") else None,
        "usage": {"prompt_tokens": fresh, "completion_tokens": len(call.sampled_ids), "cached_input_tokens": cached},
        "time": {"start": began, "end": ended},
    }


def _turn_facts(one: Told, piece: Piece, call: PolicyCall, node: int) -> dict[str, Any]:
    notes = [_note(note) for note in one.row.rewards if note.span_id == call.span_id]
    masked = {} if all(piece.loss_mask) else {"logprobs": list(piece.logprobs or ())}
    facts = {"span_id": call.span_id, "node": node, "weights_version": call.weights_version, "finish_reason": call.finish_reason}
    return {**facts, "parse_error": call.parse_error, "prefix_break": call.prefix_break, "notes": notes, **masked}


def _note(note: Annotation) -> dict[str, Any]:
    return note.model_dump(exclude={"record", "episode_id", "span_id", "created_ns"}, exclude_none=True)


def _origin(row: Row) -> dict[str, Any]:
    names = ("episode_id", "group_id", "sample_index", "role", "stream", "policy_id", "tokenizer_hash")
    return {name: getattr(row, name) for name in names}


def _placeholders(rows: Sequence[Row]) -> dict[str, int]:
    """The ids that stand for pictures. Raises ExportError where such an id stands for something else too."""
    found: dict[str, int] = {}
    for row in rows:
        ends = [(image.placeholder_start, image.placeholder_start + image.placeholder_count) for image in row.images]
        shown = [number for start, stop in ends for number in row.ids[start:stop]]
        if len(shown) != sum(number in set(shown) for number in row.ids):
            raise ExportError(f"in episode {row.episode_id} an id of a picture also stands for something else, which no trace can say")
        found.update({str(number): IMAGE for number in sorted(set(shown))})
    return found
