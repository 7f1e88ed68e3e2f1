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
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from monologue.traces import names
from monologue.traces.images import digest
from monologue.traces.schema import SCHEMA_VERSION, Annotation, Attribute, EpisodeEnd, EpisodeStart, Record, SpanEvent, SpanRecord
from monologue.traces.spans import PROJECT, Span, evaluation, root_span, step_span
from monologue.traces.store import Line, RunError, parse_line, read_info

FORMAT = 1
HEADER, FILES, RUN_JSON = "monologue.export.format", "monologue.export.files", "monologue.export.run"
PICTURE, PNG, TRAILER = "monologue.export.picture", "monologue.export.png", "monologue.export.end"
FILE, LINE, SEQ, KIND, EPISODE = (f"monologue.record.{name}" for name in ("file", "line", "seq", "kind", "episode_id"))
OWN, RECORD = "monologue.record.attributes", "monologue.record"
ENDED = "monologue.episode_end"
NAME = re.compile(r"(spans|annotations)/[A-Za-z0-9][A-Za-z0-9._-]*\.jsonl")


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
        raise RunError(
            f"cannot write the export {str(target)!r}: {error.strerror}; name a file in a folder that you may write to"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()
    return counts


def _export(run: Path, run_id: str, out: BinaryIO) -> Counts:
    counts = Counts()
    files = _files(run)
    foreign = [name for name in files if not NAME.fullmatch(name)]
    if foreign:
        raise RunError(f"cannot export {str(run)!r}: the file {foreign[0]!r} has a name that no writer gives; rename it")
    base: dict[str, Attribute] = {"service.name": "monologue", PROJECT: "monologue", names.RUN: run_id}
    text = (run / "run.json").read_bytes().decode()
    _put(out, {**base, HEADER: FORMAT, RUN_JSON: text, FILES: json.dumps(list(files))})
    for picture in sorted((run / "images").glob("*.png")):
        _put(out, {**base, PICTURE: picture.stem, PNG: _picture(picture)})
        counts.pictures += 1
    for span in _spans(run, files, counts):
        _put(out, base, span)
    _put(out, {**base, TRAILER: json.dumps({"records": counts.records, "pictures": counts.pictures})})
    return counts


def _files(run: Path) -> dict[str, int]:
    """The files of lines and how many bytes of each belong to this export: a run may grow meanwhile. Annotations first, since what they
    are about has been written before them.
    """
    paths = [path for room in ("annotations", "spans") for path in sorted((run / room).glob("*.jsonl"))]
    return {f"{path.parent.name}/{path.name}": path.stat().st_size for path in paths}


def _picture(path: Path) -> bytes:
    data = path.read_bytes()
    if digest(data) != path.stem:
        raise RunError(f"cannot export the picture {str(path)!r}: its bytes have another hash than its name; the run is damaged")
    return data


def _spans(run: Path, files: Mapping[str, int], counts: Counts) -> Iterator[Span]:
    """Every record as a span or within one, in the order of the files; ends and annotations travel with their episode's start."""
    notes: dict[str, list[Placed]] = {}
    for placed in _records(run, files, "annotations/", counts):
        notes.setdefault(str(getattr(placed.record, "episode_id", "")), []).append(placed)
    ends = {one.record.episode_id: one for one in _records(run, files, "spans/", Counts()) if isinstance(one.record, EpisodeEnd)}
    carried = 0
    for placed in _records(run, files, "spans/", counts):
        record = placed.record
        if isinstance(record, EpisodeStart):
            said, end = notes.pop(record.episode_id, []), ends.pop(record.episode_id, None)
            yield _root(placed, record, end, said)
            carried += 1 + len(said) + (end is not None)
            counts.episodes += 1
        elif isinstance(record, SpanRecord):
            yield _step(placed, record)
            carried += 1
    if carried != counts.records:
        raise RunError(f"cannot export {str(run)!r}: {counts.records - carried} ends or annotations belong to no episode; it is damaged")


def _records(run: Path, files: Mapping[str, int], room: str, counts: Counts) -> Iterator[Placed]:
    for name, size in files.items():
        if not name.startswith(room):
            continue
        with (run / name).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                size -= len(line)
                if size < 0:
                    break
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
    made = replace(plain, attributes=facts, events=tuple(events))
    _must_come_back(placed, [placed, *notes, *([end] if end else [])], made)
    return made


def _event(event: SpanEvent, placed: Placed) -> SpanEvent:
    return SpanEvent(
        name=event.name, time_ns=event.time_ns, attributes={**event.attributes, RECORD: placed.record.model_dump_json(), **placed.place}
    )


def _step(placed: Placed, span: SpanRecord) -> Span:
    where = {OWN: len(span.attributes), SEQ: span.seq, KIND: span.kind, EPISODE: span.episode_id, **placed.place}
    made = replace(step_span(span), attributes={**span.attributes, **where})
    _must_come_back(placed, [placed], made)
    return made


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


# In


def from_json(file: str | Path, run: str | Path) -> Counts:
    """The run that ``to_json`` wrote, in a new folder. Raises RunError, with the line, for whatever is not such an export."""
    source, target = Path(file), Path(run)
    if target.exists():
        raise RunError(f"cannot import into {str(target)!r}: it exists already; name another folder")
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with source.open("rb") as lines:
            part.mkdir(parents=True)
            counts = _Import(part, source).read(lines)
        os.rename(part, target)
    except OSError as error:
        raise RunError(f"cannot import {str(source)!r} into {str(target)!r}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


@dataclass
class _Sheet:
    """A file of lines being rebuilt; lines that come early wait for their number."""

    file: BinaryIO
    written: int = 0
    early: dict[int, bytes] = field(default_factory=dict)

    def put(self, number: int, line: bytes) -> None:
        if number <= self.written or number in self.early:
            raise ValueError(f"line {number} of its file comes twice")
        self.early[number] = line
        while self.written + 1 in self.early:
            self.written += 1
            self.file.write(self.early.pop(self.written))


class _Import:
    """Reads an export line by line. What is held in memory: annotations whose turn has not come, and ends of episodes under way."""

    def __init__(self, run: Path, source: Path) -> None:
        self.run, self.source = run, source
        self.counts = Counts()
        self._sheets: dict[str, _Sheet] = {}
        self._headed = False
        self._wanted: dict[str, int] | None = None

    def read(self, lines: Iterable[bytes]) -> Counts:
        """All lines. Raises RunError."""
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                self._take(number, line)
        finally:
            for sheet in self._sheets.values():
                sheet.file.close()
        found = {"records": self.counts.records, "pictures": self.counts.pictures}
        if self._wanted is None:
            raise RunError(f"{str(self.source)!r} ends after line {number} without its last line: it was cut off; export the run again")
        short = [name for name, sheet in self._sheets.items() if sheet.early]
        if found != self._wanted or short:
            raise RunError(f"{str(self.source)!r} holds {found}, but {self._wanted} were exported: lines were lost; export the run again")
        return self.counts

    def _take(self, number: int, line: bytes) -> None:
        place = f"{str(self.source)!r}, line {number}"
        if not line.endswith(b"\n"):
            raise RunError(f"{place}: torn, it has no end; the file was cut off, export the run again")
        try:
            for group in json.loads(line)["resourceSpans"]:
                self._resource(_values(group["resource"]["attributes"]))
                for scope in group.get("scopeSpans", ()):
                    for span in scope["spans"]:
                        self._span(span)
        except (RunError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            told = f"it lacks {told}" if isinstance(error, KeyError) else told
            raise RunError(f"{place}: not a line that 'monologue export --to otlp-json' wrote ({told})") from error

    def _resource(self, facts: Mapping[str, Any]) -> None:
        if HEADER in facts:
            self._head(facts)
        if not self._headed:
            raise ValueError("the export's first line is missing")
        if PICTURE in facts:
            self._picture(facts[PICTURE], facts[PNG])
        if TRAILER in facts:
            self._wanted = json.loads(facts[TRAILER])

    def _head(self, facts: Mapping[str, Any]) -> None:
        version = json.loads(facts[RUN_JSON]).get("schema_version")
        if (facts[HEADER], version) != (FORMAT, SCHEMA_VERSION) or self._headed:
            wanted = f"this program reads one run of format {FORMAT}, schema version {SCHEMA_VERSION}"
            raise ValueError(f"format {facts[HEADER]}, schema version {version}; {wanted}")
        self._headed = True
        for room in ("spans", "annotations", "images"):
            (self.run / room).mkdir()
        (self.run / "run.json").write_bytes(facts[RUN_JSON].encode())
        for name in json.loads(facts[FILES]):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no file of a run")
            self._sheets[name] = _Sheet((self.run / name).open("xb"))

    def _picture(self, sha256: str, data: bytes) -> None:
        if digest(data) != sha256:
            raise ValueError(f"the picture {sha256[:12]!r} has other bytes than its name says")
        (self.run / "images" / f"{sha256}.png").write_bytes(data)
        self.counts.pictures += 1

    def _span(self, span: Mapping[str, Any]) -> None:
        for file, number, line in _back(span):
            parse_line(line, f"{file}, line {number}")
            self._sheets[file].put(number, line)
            self.counts.records += 1
            self.counts.episodes += line.startswith(b'{"record":"episode_start"')


def _back(span: Mapping[str, Any]) -> Iterator[tuple[str, int, bytes]]:
    """The lines that a span was made of, with their file and number."""
    facts = _values(span["attributes"])
    if OWN in facts:
        yield facts[FILE], facts[LINE], _line(_step_record(span, facts))
        return
    for carrier in (facts, *(_values(event["attributes"]) for event in span["events"])):
        yield carrier[FILE], carrier[LINE], str(carrier[RECORD]).encode() + b"\n"


def _step_record(span: Mapping[str, Any], facts: Mapping[str, Any]) -> SpanRecord:
    events = [{"name": e["name"], "time_ns": int(e["timeUnixNano"]), "attributes": _values(e["attributes"])} for e in span["events"]]
    found = {
        "episode_id": facts[EPISODE],
        "seq": facts[SEQ],
        "name": span["name"],
        "kind": facts[KIND],
        "trace_id": span["traceId"],
        "span_id": span["spanId"],
        "parent_id": span.get("parentSpanId", ""),
        "start_ns": int(span["startTimeUnixNano"]),
        "end_ns": int(span["endTimeUnixNano"]),
        "status": "error" if span["status"].get("code") == 2 else "ok",
        "attributes": dict(list(facts.items())[: facts[OWN]]),
        "events": events,
    }
    return SpanRecord.model_validate(found)


def _values(attributes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {one["key"]: _value(one["value"]) for one in attributes}


def _value(value: Mapping[str, Any]) -> Attribute | bytes:
    [(kind, plain)] = value.items()
    if kind == "stringValue":
        return str(plain)
    if kind == "boolValue":
        return bool(plain)
    if kind == "intValue":
        return int(plain)
    if kind == "doubleValue":
        return float(plain)
    if kind == "bytesValue":
        return base64.b64decode(plain, validate=True)
    raise ValueError(f"a value of the kind {kind!r}")
