"""A run as OpenTelemetry spans, and as a file of them that holds the whole run: what goes in comes back bit for bit.

    to_json(run, file)     one ExportTraceServiceRequest a line, protobuf's JSON form: ids as hex, nanoseconds and integers as strings
    from_json(file, run)   the run folder again: run.json, every record, every picture

Any collector's file reader takes the lines. A step is a span with its own attributes first and where it stood (file, line, order) behind
them; an episode's root span holds the start record, its end as an event, and each annotation as a ``gen_ai.evaluation.result`` event. What
is no span (run.json, pictures, the count of everything) stands on resources without spans, which viewers pass over.

Every line is read back before it is written, so an export that could not be imported is never made; the last line counts the others, so a
file that was cut off between two lines is noticed. The import is built beside its place and moved there whole. Left out: torn last lines
of killed processes, which are no records and are counted; protobuf, since JSON needs no package.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from monologue.traces import names
from monologue.traces.images import digest
from monologue.traces.schema import SCHEMA_VERSION, Annotation, Attribute, EpisodeEnd, EpisodeStart, Record, SpanEvent, SpanRecord
from monologue.traces.store import Line, RunError, parse_line, read_info

FORMAT = 1
PROJECT = "openinference.project.name"
HEADER, FILES, RUN_JSON = "monologue.export.format", "monologue.export.files", "monologue.export.run"
PICTURE, PNG, TRAILER = "monologue.export.picture", "monologue.export.png", "monologue.export.end"
FILE, LINE, SEQ, KIND, EPISODE = (f"monologue.record.{name}" for name in ("file", "line", "seq", "kind", "episode_id"))
OWN, RECORD = "monologue.record.attributes", "monologue.record"
ENDED, EVALUATED = "monologue.episode_end", "gen_ai.evaluation.result"
NAME = re.compile(r"(spans|annotations)/[A-Za-z0-9][A-Za-z0-9._-]*\.jsonl")


@dataclass(frozen=True, slots=True)
class Span:
    """A span as any exporter needs it."""

    name: str
    """Its OpenTelemetry name."""
    trace_id: str
    """32 hex digits."""
    span_id: str
    """16 hex digits."""
    parent_id: str
    """16 hex digits; empty for a root."""
    client: bool
    """It calls a model."""
    start_ns: int
    """Nanoseconds since 1970."""
    end_ns: int
    """Nanoseconds since 1970."""
    error: str | None
    """What went wrong; None: nothing."""
    attributes: Mapping[str, Attribute]
    """Facts."""
    events: tuple[SpanEvent, ...] = ()
    """Moments."""


@dataclass(slots=True)
class Counts:
    """What an export or import has moved."""

    records: int = 0
    """Lines of the run."""
    episodes: int = 0
    """Of these, episode starts."""
    pictures: int = 0
    """Picture files."""
    torn: int = 0
    """Torn last lines that were left out."""
    reformatted: int = 0
    """Lines that another program had written with other spacing: equal as records, not as bytes."""


def root_span(start: EpisodeStart, end: EpisodeEnd | None, notes: Iterable[Annotation]) -> Span:
    """An episode as the span that its steps hang under; what was said about it are events."""
    facts: dict[str, Attribute | None] = {
        names.KIND: "episode",
        names.VERSION: start.schema_version,
        names.RUN: start.run_id,
        names.EPISODE: start.episode_id,
        names.CONVERSATION: start.episode_id,
        names.GROUP: start.group_id,
        names.SAMPLE: start.sample_index,
        names.ATTEMPT: start.attempt,
        names.OPERATION: "invoke_agent",
        names.AGENT: start.graph,
        names.INPUT_MESSAGES: _said("user", start.question, start.choices) if start.question else None,
        names.OUTPUT_MESSAGES: _said("assistant", end.answer) if end and end.answer is not None else None,
    }
    broken = None if end is None or end.status == "ok" else end.error or end.status
    return Span(
        name=f"invoke_agent {start.graph}",
        trace_id=start.episode_id,
        span_id=start.root_span_id,
        parent_id="",
        client=False,
        start_ns=start.started_ns,
        end_ns=max(start.started_ns, end.ended_ns) if end else start.started_ns,
        error=broken,
        attributes={name: value for name, value in facts.items() if value is not None},
        events=tuple(evaluation(note) for note in notes),
    )


def step_span(span: SpanRecord) -> Span:
    """A step as a span."""
    return Span(
        name=span.name,
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_id=span.parent_id,
        client=span.kind == "policy",
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        error=str(span.attributes.get(names.ERROR, "error")) if span.status == "error" else None,
        attributes=span.attributes,
        events=span.events,
    )


def evaluation(note: Annotation) -> SpanEvent:
    """An annotation as the conventions have it."""
    facts: dict[str, Attribute | None] = {
        "gen_ai.evaluation.name": note.name,
        "gen_ai.evaluation.score.value": note.value,
        "gen_ai.evaluation.explanation": note.text,
        "monologue.source": note.source,
        "monologue.scope": note.scope,
        "monologue.weight": note.weight,
        "monologue.span_id": note.span_id,
    }
    told = {name: value for name, value in facts.items() if value is not None}
    return SpanEvent(name=EVALUATED, time_ns=note.created_ns, attributes=told)


def _said(role: str, text: str, choices: Sequence[str] = ()) -> str:
    listed = "\n".join((text, *(f"- {choice}" for choice in choices)))
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": listed}]}], ensure_ascii=False)


# Out


@dataclass(frozen=True, slots=True)
class Placed:
    """A record and where it stands."""

    file: str
    """Within the run."""
    number: int
    """Line, from 1."""
    record: Line
    """What stands there."""
    canonical: bool
    """It is written as we write it."""

    @property
    def place(self) -> dict[str, Attribute]:
        return {FILE: self.file, LINE: self.number}


def to_json(run: str | Path, file: str | Path) -> Counts:
    """Writes the whole run into one file. Raises RunError where the run cannot be read or the file not be written; then there is none."""
    source, target = Path(run), Path(file)
    info = read_info(source)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as out:
            counts = _export(source, str(info["run_id"]), out)
        os.replace(part, target)
    except OSError as error:
        raise RunError(f"cannot write the export {str(target)!r}: {error.strerror}; name a file in a folder that you may write to") from error
    finally:
        part.unlink(missing_ok=True)
    return counts


def _export(run: Path, run_id: str, out: BinaryIO) -> Counts:
    counts = Counts()
    files = [f"{room}/{path.name}" for room in ("spans", "annotations") for path in sorted((run / room).glob("*.jsonl"))]
    foreign = [name for name in files if not NAME.fullmatch(name)]
    if foreign:
        raise RunError(f"cannot export {str(run)!r}: the file {foreign[0]!r} has a name that no writer gives; rename it")
    base: dict[str, Attribute] = {"service.name": "monologue", PROJECT: "monologue", names.RUN: run_id}
    text = (run / "run.json").read_bytes().decode()
    _put(out, {**base, HEADER: FORMAT, RUN_JSON: text, FILES: json.dumps(files)})
    for picture in sorted((run / "images").glob("*.png")):
        _put(out, {**base, PICTURE: picture.stem, PNG: _picture(picture)})
        counts.pictures += 1
    for span in _spans(run, files, counts):
        _put(out, base, span)
    _put(out, {**base, TRAILER: json.dumps({"records": counts.records, "pictures": counts.pictures})})
    return counts


def _picture(path: Path) -> bytes:
    data = path.read_bytes()
    if digest(data) != path.stem:
        raise RunError(f"cannot export the picture {str(path)!r}: its bytes have another hash than its name; the run is damaged")
    return data


def _spans(run: Path, files: Sequence[str], counts: Counts) -> Iterator[Span]:
    """Every record as a span or within one, in the order of the files; ends and annotations travel with their episode's start."""
    notes: dict[str, list[Placed]] = {}
    for placed in _records(run, [name for name in files if name.startswith("annotations/")], counts):
        notes.setdefault(str(getattr(placed.record, "episode_id", "")), []).append(placed)
    spans = [name for name in files if name.startswith("spans/")]
    ends = {one.record.episode_id: one for one in _records(run, spans, Counts()) if isinstance(one.record, EpisodeEnd)}
    for placed in _records(run, spans, counts):
        record = placed.record
        if isinstance(record, EpisodeStart):
            yield _root(placed, record, ends.pop(record.episode_id, None), notes.pop(record.episode_id, []))
        elif isinstance(record, SpanRecord):
            yield _step(placed, record)
        counts.episodes += isinstance(record, EpisodeStart)
    left = [*ends.values(), *(note for some in notes.values() for note in some)]
    if left:
        raise RunError(f"{run / left[0].file}, line {left[0].number}: a record of an episode that never began; the run is damaged")


def _records(run: Path, files: Iterable[str], counts: Counts) -> Iterator[Placed]:
    for name in files:
        with (run / name).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    counts.torn += 1
                    break
                record = parse_line(line, f"{run / name}, line {number}")
                placed = Placed(name, number, record, line == _line(record))
                counts.records += 1
                counts.reformatted += not placed.canonical
                yield placed


def _root(placed: Placed, start: EpisodeStart, end: Placed | None, notes: Sequence[Placed]) -> Span:
    ended = end.record if end and isinstance(end.record, EpisodeEnd) else None
    plain = root_span(start, ended, ())
    events = [_event(evaluation(note.record), note) for note in notes if isinstance(note.record, Annotation)]
    if end and ended:
        events.append(_event(SpanEvent(name=ENDED, time_ns=ended.ended_ns, attributes={}), end))
    facts = {**plain.attributes, RECORD: start.model_dump_json(), **placed.place}
    made = _with(plain, facts, tuple(events))
    _must_come_back(placed, [placed, *notes, *([end] if end else [])], made)
    return made


def _event(event: SpanEvent, placed: Placed) -> SpanEvent:
    return SpanEvent(
        name=event.name, time_ns=event.time_ns, attributes={**event.attributes, RECORD: placed.record.model_dump_json(), **placed.place}
    )


def _step(placed: Placed, span: SpanRecord) -> Span:
    where = {OWN: len(span.attributes), SEQ: span.seq, KIND: span.kind, EPISODE: span.episode_id, **placed.place}
    made = _with(step_span(span), {**span.attributes, **where}, span.events)
    _must_come_back(placed, [placed], made)
    return made


def _with(span: Span, attributes: Mapping[str, Attribute], events: tuple[SpanEvent, ...]) -> Span:
    return Span(
        span.name,
        span.trace_id,
        span.span_id,
        span.parent_id,
        span.client,
        span.start_ns,
        span.end_ns,
        span.error,
        attributes,
        events,
    )


def _must_come_back(placed: Placed, wanted: Sequence[Placed], span: Span) -> None:
    try:
        found = {(file, number): line for file, number, line in _back(json.loads(json.dumps(_plain_span(span))))}
    except (ValueError, KeyError, TypeError) as error:
        found = {}
        cause: Exception | None = error
    else:
        cause = None
    if found != {(one.file, one.number): _line(one.record) for one in wanted}:
        told = f" ({cause})" if cause else ""
        raise RunError(f"{placed.file}, line {placed.number}: this record cannot be carried by OpenTelemetry{told}; nothing was exported")


def _line(record: Record) -> bytes:
    return record.model_dump_json().encode() + b"\n"


def _put(out: BinaryIO, resource: Mapping[str, Attribute | bytes], span: Span | None = None) -> None:
    scope = {"scope": {"name": "monologue"}, "spans": [_plain_span(span)], "schemaUrl": names.SCHEMA_URL} if span else None
    request = {"resourceSpans": [{"resource": {"attributes": _plain(resource)}, "scopeSpans": [scope] if scope else []}]}
    out.write(json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def _plain_span(span: Span) -> dict[str, Any]:
    status = {} if span.error is None else {"code": 2, "message": span.error}
    return {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        **({"parentSpanId": span.parent_id} if span.parent_id else {}),
        "name": span.name,
        "kind": 3 if span.client else 1,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _plain(span.attributes),
        "events": [{"timeUnixNano": str(e.time_ns), "name": e.name, "attributes": _plain(e.attributes)} for e in span.events],
        "status": status,
    }


def _plain(attributes: Mapping[str, Attribute | bytes]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _plain_value(value)} for key, value in attributes.items()]


def _plain_value(value: Attribute | bytes) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{value} has more than 64 bits")
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value if math.isfinite(value) else str(value)}
    if isinstance(value, bytes):
        return {"bytesValue": base64.b64encode(value).decode()}
    return {"stringValue": value}
