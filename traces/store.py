"""A run on disk, and nothing else: a folder of append-only lines that any number of processes may write and a crash cannot spoil.

    RUN/run.json                 schema version, run id, configuration, versions
    RUN/spans/WRITER.jsonl       one file a writing process: episode starts, spans, episode ends
    RUN/annotations/WRITER.jsonl what was said about them later
    RUN/images/SHA256.png        each picture once

Every record is one line and one ``write``; a line that could not be written whole is cut off again, so a full disk leaves no broken line.
What a killed process leaves is at worst one torn last line, which readers skip and count. Anything else that does not read is an error that
names file and line. No database: lines survive SIGKILL at 45 microseconds a span, a synchronous database commit takes milliseconds.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from monologue.traces.images import PictureError, decode, keep
from monologue.traces.schema import (
    SCHEMA_VERSION,
    Annotation,
    EpisodeEnd,
    EpisodeStart,
    PolicyCall,
    Record,
    SpanRecord,
    calls_of,
)

Line: TypeAlias = "EpisodeStart | SpanRecord | EpisodeEnd | Annotation"
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[EpisodeStart | SpanRecord | EpisodeEnd | Annotation, Field(discriminator="record")])


class RunError(Exception):
    """A run folder that cannot be written or read."""


class Appender:
    """Whole lines at the end of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._mend()
        except OSError as error:
            raise _unwritable(path, error) from error

    def _mend(self) -> None:
        """Cuts off the torn last line that a killed process left, so that the next one begins on a line of its own."""
        end = os.fstat(self._file).st_size
        while end and os.pread(self._file, 1, end - 1) != b"\n":
            end -= 1
        os.ftruncate(self._file, end)

    def append(self, line: bytes) -> None:
        """One line, or none of it. Raises RunError."""
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            os.ftruncate(self._file, before)
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write to the run, {str(path)!r}: {error.strerror}; free space or name another folder; what was written is kept"
    )


class RunWriter:
    """One process's pen in a run folder."""

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None, resume: bool = False, name: str = "") -> None:
        """Makes the folder, or joins it with ``resume``. Raises RunError where it exists already, is foreign, or cannot be written.

        ``name`` is that of the pen's files (default: one that no other process has). Whoever gives one sees to it that only one process at
        a time writes under it, and may take it up again after a crash.
        """
        self.path = Path(path)
        try:
            for part in ("spans", "annotations", "images"):
                (self.path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.info = self._join(dict(config or {}), resume)
        self.run_id = str(self.info["run_id"])
        self.named, self.name = bool(name), name or f"{os.getpid()}-{secrets.token_hex(4)}"
        self._spans = Appender(self.path / "spans" / f"{self.name}.jsonl")
        self._notes: Appender | None = None
        self.listener: Callable[[Record], None] | None = None
        """Told of each record once it is on disk."""

    def _join(self, config: dict[str, Any], resume: bool) -> dict[str, Any]:
        info = self.path / "run.json"
        fresh = {
            "schema_version": SCHEMA_VERSION,
            "run_id": uuid.uuid4().hex,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "python": platform.python_version(),
            "config": config,
        }
        part = info.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps(fresh, indent=1, default=str) + "\n")
            os.link(part, info)
            return fresh
        except FileExistsError:
            if not resume:
                raise RunError(f"a run exists in {str(self.path)!r} already; name another folder, or resume it") from None
            return read_info(self.path)
        except OSError as error:
            raise _unwritable(info, error) from error
        finally:
            part.unlink(missing_ok=True)

    def write(self, record: EpisodeStart | SpanRecord | EpisodeEnd) -> None:
        """Appends one record. Raises RunError."""
        self._spans.append(record.model_dump_json().encode() + b"\n")
        if self.listener:
            self.listener(record)

    def annotate(self, record: Annotation) -> None:
        """Appends one annotation. Raises RunError."""
        if self._notes is None:
            self._notes = Appender(self.path / "annotations" / f"{self.name}.jsonl")
        self._notes.append(record.model_dump_json().encode() + b"\n")
        if self.listener:
            self.listener(record)

    def keep(self, png: bytes) -> str:
        """Keeps a picture and returns its hash. Raises RunError."""
        try:
            return keep(self.path / "images", png)
        except OSError as error:
            raise _unwritable(self.path / "images", error) from error

    def close(self) -> None:
        self._spans.close()
        if self._notes is not None:
            self._notes.close()


def read_info(path: str | Path) -> dict[str, Any]:
    """run.json of a run. Raises RunError where there is none or it is of another schema version."""
    file = Path(path) / "run.json"
    try:
        info = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{str(path)!r} is no run folder: it has no run.json; give the folder that 'monologue play --out' wrote") from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {str(file)!r}: {error}") from error
    found = info.get("schema_version") if isinstance(info, dict) else None
    if found != SCHEMA_VERSION:
        raise RunError(f"{str(path)!r} has schema version {found!r}, this program reads {SCHEMA_VERSION}; use the release that wrote it")
    return dict(info)


@dataclass
class Episode:
    """Everything that a run holds about one episode."""

    start: EpisodeStart
    """How it began."""
    spans: list[SpanRecord] = field(default_factory=list)
    """Its finished steps in order."""
    end: EpisodeEnd | None = None
    """How it ended; None: it never did."""
    annotations: list[Annotation] = field(default_factory=list)
    """What was said about it."""

    @property
    def complete(self) -> bool:
        """It ended well."""
        return self.end is not None and self.end.status == "ok"

    def calls(self) -> list[PolicyCall]:
        """Its policy calls in order, prompts rebuilt. Raises ValueError where a span is missing."""
        return calls_of(self.spans)


class RunReader:
    """A run as it lies. Episodes stream from the files one writer after another; only those under way are held in memory."""

    def __init__(self, path: str | Path, writers: str = "*") -> None:
        """``writers``: a pattern of pens' names; only what they wrote is read. Raises RunError."""
        self.path, self._writers = Path(path), writers
        self.info = read_info(path)
        self.torn = 0
        """Torn last lines that the last pass over the run has skipped."""

    def episodes(self) -> Iterator[Episode]:
        """Finished episodes as they end, unfinished ones of a writer at its file's end. Raises RunError on a corrupt line."""
        self.torn = 0
        notes = self._annotations()  # where they lie, not what they say: a run may have more of them than fit in memory
        for file in sorted((self.path / "spans").glob(f"{self._writers}.jsonl")):
            open_ones: dict[str, Episode] = {}
            for number, record in self._lines(file):
                if isinstance(record, EpisodeStart):
                    open_ones[record.episode_id] = Episode(record, annotations=list(_read(notes.get(record.episode_id, ()))))
                    continue
                episode = open_ones.get(getattr(record, "episode_id", ""))
                if episode is None:
                    raise RunError(f"{file}, line {number}: a record of an episode that has not begun or has ended")
                if isinstance(record, SpanRecord):
                    episode.spans.append(record)
                elif isinstance(record, EpisodeEnd):
                    episode.end = record
                    yield _sorted(open_ones.pop(record.episode_id))
            yield from (_sorted(episode) for episode in open_ones.values())

    def picture(self, sha256: str) -> Any:
        """A stored picture. Raises PictureError."""
        file = self.path / "images" / f"{sha256}.png"
        if not file.is_file():
            raise PictureError(f"the run lacks the picture {sha256}; it was removed from {str(file.parent)!r}")
        return decode(file.read_bytes(), f"the stored picture {sha256}")

    def _annotations(self) -> dict[str, list[tuple[Path, int]]]:
        """File and offset of every annotation, by episode."""
        found: dict[str, list[tuple[Path, int]]] = {}
        for file in sorted((self.path / "annotations").glob(f"{self._writers}.jsonl")):
            offset = 0
            for number, line in self._whole_lines(file):
                record = parse_line(line, f"{file}, line {number}")
                assert isinstance(record, Annotation)
                found.setdefault(record.episode_id, []).append((file, offset))
                offset += len(line)
        return found

    def _lines(self, file: Path) -> Iterator[tuple[int, Line]]:
        for number, line in self._whole_lines(file):
            yield number, parse_line(line, f"{file}, line {number}")

    def _whole_lines(self, file: Path) -> Iterator[tuple[int, bytes]]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    self.torn += 1
                    return
                yield number, line


def _read(places: Sequence[tuple[Path, int]]) -> Iterator[Annotation]:
    for file, offset in places:
        with file.open("rb") as lines:
            lines.seek(offset)
            record = parse_line(lines.readline(), str(file))
            assert isinstance(record, Annotation)
            yield record


def parse_line(line: bytes, place: str) -> Line:
    """One record. Raises RunError that names the place."""
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise RunError(
            f"{place}: not a record of this schema ({where or 'line'}: {fault['msg']}); the file was edited or damaged"
        ) from error


def _sorted(episode: Episode) -> Episode:
    episode.spans.sort(key=lambda span: span.seq)
    return episode
