"""One episode as plain JSON: everything the page shows of it, ids and log-probs decoded.

Numbers go out as they are stored: a float32 widened to float64 prints the same digits in Python and in the browser, so the value on hover
is the value in the trace. What did not happen is null, and the page says "not recorded"; a number that is none (NaN) goes out as a word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monologue.traces import names
from monologue.traces.codes import unpack_bytes, unpack_floats, unpack_ids
from monologue.traces.page.index import Place, Row, reward_of, steps_of
from monologue.traces.page.pieces import Pieces
from monologue.traces.schema import EpisodeEnd, SpanRecord
from monologue.traces.store import RunError, parse_line

CURVES = ("curve.jsonl", "metrics.jsonl")
MOST_POINTS = 500
TOKEN_VALUES = ("advantage", "entropy")
"""Token-scoped annotations of these names shade the tokens."""


def detail(row: Row, pieces: Pieces) -> dict[str, Any]:
    """An episode for the page. Raises RunError where a line of it does not read."""
    spans, end = [], None
    for place in row.places:
        record = parse_line(_bytes(place), f"{place[0]}, byte {place[1]}")
        if isinstance(record, SpanRecord):
            spans.append(record)
        elif isinstance(record, EpisodeEnd):
            end = record.model_dump()
    spans.sort(key=lambda span: span.seq)
    notes = [_note(record) for record in row.notes]
    return {
        "number": row.number,
        "revision": row.revision,
        "start": row.start,
        "end": end,
        "reward": reward_of(row.notes),
        "notes": notes,
        "spans": [_span(span, pieces, notes) for span in spans],
        "path": _path(spans) if end else _path(spans)[:-1],
    }


def _path(spans: Sequence[SpanRecord]) -> list[tuple[str, str, str]]:
    seen = [(span.seq, span.attributes) for span in spans if names.NODE in span.attributes]
    return steps_of((seq, str(a[names.NODE]), None if a.get(names.EDGE) is None else str(a[names.EDGE])) for seq, a in seen)


def _bytes(place: Place) -> bytes:
    file, at, length = place
    try:
        with file.open("rb") as lines:
            lines.seek(at)
            return lines.read(length)
    except OSError as error:
        raise RunError(f"cannot read {str(file)!r}: {error.strerror}; the run was moved or removed") from error


def _note(record: Mapping[str, Any]) -> dict[str, Any]:
    note = dict(record)
    note["values"] = _try(unpack_floats, note.get("values"))
    return note


def _span(span: SpanRecord, pieces: Pieces, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    a: Mapping[str, Any] = span.attributes
    known = {
        "seq": span.seq,
        "id": span.span_id,
        "kind": span.kind,
        "name": span.name,
        "status": span.status,
        "ms": (span.end_ns - span.start_ns) / 1e6,
        "node": a.get(names.NODE),
        "edge": a.get(names.EDGE),
        "role": a.get(names.ROLE),
        "error": a.get(names.ERROR),
        "images": _images(a),
        "events": [event.model_dump() for event in span.events],
    }
    if span.kind == "policy":
        return {**known, **_call(span, pieces, notes)}
    if span.kind == "tool":
        facts = {"tool": a.get(names.TOOL_NAME), "arguments": a.get(names.TOOL_ARGUMENTS), "result": a.get(names.TOOL_RESULT)}
        return {**known, **facts}
    return known


def _call(span: SpanRecord, pieces: Pieces, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    a: Mapping[str, Any] = span.attributes
    shown = {
        "stream": names.STREAM,
        "turn": names.TURN,
        "output": names.OUTPUT,
        "fault": names.PARSE_ERROR,
        "truncated": names.TRUNCATED,
        "model": names.MODEL,
        "policy": names.POLICY,
        "weights": names.WEIGHTS,
        "engine": names.ENGINE,
        "trainable": names.TRAINABLE,
        "temperature": names.TEMPERATURE,
        "seed": names.SEED,
        "input": names.INPUT_TOKENS,
        "cached": names.CACHED_TOKENS,
        "prefix": names.PREFIX_LENGTH,
        "broken": names.PREFIX_BREAK,
    }
    return {
        **{name: a.get(key) for name, key in shown.items()},
        "finish": (_try(json.loads, a.get(names.FINISH)) or [None])[0],
        "messages": _try(json.loads, a.get(names.INPUT_MESSAGES)) or [],
        "action": _try(json.loads, a.get(names.ACTION)),
        "attention": [_try(unpack_floats, one) for one in _try(json.loads, a.get(names.ATTENTION)) or []],
        "latents": _latents(span),
        "tokens": _tokens(span, pieces, notes),
    }


def _latents(span: SpanRecord) -> list[dict[str, Any]]:
    """Latent steps of a call: patches that each read again, the norm of its state, and what that was nearest to saying."""
    found = []
    for event in span.events:
        if event.name == names.LATENT_STEP:
            read = {name: _try(json.loads, event.attributes.get(name)) for name in ("chosen", "words", "chances")}
            lists = {name: value if isinstance(value, list) else [] for name, value in read.items()}
            found.append({"step": event.attributes.get("step"), "norm": event.attributes.get("norm"), **lists})
    return found


def _tokens(span: SpanRecord, pieces: Pieces, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    a: Mapping[str, Any] = span.attributes
    ids = _try(unpack_ids, a.get(names.SAMPLED_IDS))
    if ids is None:
        return None
    mask = _try(unpack_bytes, a.get(names.LOSS_MASK))
    values: dict[str, Any] = {"logprob": _try(unpack_floats, a.get(names.SAMPLED_LOGPROBS))}
    maker = str(a.get(names.TOKENIZER, "")), str(a.get(names.MODEL, ""))
    values["entropy"] = _try(unpack_floats, a.get(names.SAMPLED_ENTROPIES))
    for name in TOKEN_VALUES:
        found = _spread(name, span, len(ids), notes)
        values[name] = found if found is not None else values.get(name)
    return {
        "ids": ids,
        "text": pieces.of(ids, *maker),
        "gap": pieces.gap(*maker),
        "mask": None if mask is None else list(mask),
        "values": values,
    }


def _spread(name: str, span: SpanRecord, count: int, notes: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """A value for each token: the last token-scoped annotation, or else the narrowest wider one, the same for every token."""
    found: dict[str, list[float]] = {}
    role = span.attributes.get(names.ROLE)
    for note in notes:
        scope = note.get("scope")
        here = note.get("span_id") == span.span_id or (note.get("span_id") is None and scope == "episode")
        here = here or (note.get("span_id") is None and scope == "role" and note.get("role") == role)
        if note.get("name") != name or not here:
            continue
        if scope == "token" and note.get("values") is not None:
            found["token"] = list(note["values"])
        elif isinstance(note.get("value"), (int, float)):
            found[str(scope)] = [note["value"]] * count
    return next((found[scope] for scope in ("token", "turn", "role", "episode") if scope in found), None)


def _images(a: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = _try(json.loads, a.get(names.IMAGES)) or []
    shown = ("sha256", "width", "height", "grid", "placeholder_count")
    return [{name: one.get(name) for name in shown} for one in listed if isinstance(one, dict)]


def picture(run: Path, sha256: str) -> bytes | None:
    """A stored picture as it lies; None where there is none, or where a link or another sort of file stands in its place."""
    file = run / "images" / f"{sha256}.png"
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or file.is_symlink() or not file.is_file():
        return None
    data = file.read_bytes()
    return data if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def _try(read: Callable[[Any], Any], value: Any) -> Any:
    """What a field says, or None where it is absent or damaged: a viewer shows the rest."""
    try:
        return None if value is None else read(value)
    except (ValueError, TypeError, RecursionError):
        return None


def encoded(value: Any) -> str:
    """Compact JSON that every browser reads."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(clean(value), separators=(",", ":"))


def clean(value: Any) -> Any:
    """The value with NaN and infinities as words, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: clean(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(one) for one in value]
    return value


def curves(run: Path) -> list[dict[str, Any]]:
    """Training curves beside the run: one series for each number of ``curve.jsonl`` or ``metrics.jsonl``, by stage."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name in CURVES:
        for place, line in enumerate(_lines(run / name)):
            stage, step = str(line.get("stage", "")), line.get("step", place)
            for key, value in line.items():
                if key != "step" and _is_number(value) and _is_number(step):
                    found.setdefault((stage, key), []).append((step, value))
    return [{"stage": stage, "name": key, "points": thinned(points)} for (stage, key), points in found.items()]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point and the last, MOST_POINTS at most."""
    stride = max(1, -(-len(points) // MOST_POINTS))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept[: MOST_POINTS - 1], points[-1]]


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    try:
        text = file.read_text(errors="replace") if file.is_file() else ""
    except OSError:
        return
    for line in text.splitlines():
        found = _try(json.loads, line)
        if isinstance(found, dict):
            yield found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
