"""One row per episode, kept up to date while the run grows.

Ten thousand episodes must be listed before anybody grows impatient, so a run is read twice: first beginnings, ends and rewards, while of a
span only its place is remembered; then the spans, for roles, tokens, faults, the text filter and the graph. An episode is parsed whole when
somebody opens it. Later passes read only what was appended. Lines that do not read are counted and named, never fatal: a damaged run is
when a viewer is needed most.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, TypeAlias

from pydantic import Field, TypeAdapter

from monologue.traces import names
from monologue.traces.schema import Annotation, EpisodeEnd, EpisodeStart, SpanRecord
from monologue.traces.store import Line, read_info

FIELDS = (
    *("id", "group", "sample", "attempt", "problem", "task", "graph", "family", "question", "gold", "status", "answer", "error"),
    *("reward", "turns", "tokens", "faults", "failures", "roles", "started", "ended", "notes"),
)
"""What a row holds, in order."""
SEARCHED = 20_000
"""Characters of each output that the text filter looks through."""
Place: TypeAlias = "tuple[Path, int, int]"
"""File, first byte and length of a line."""
Step: TypeAlias = "tuple[int, str, str | None]"
"""Sequence number, node, edge taken."""

_RECORD: TypeAdapter[Line] = TypeAdapter(Annotated[EpisodeStart | SpanRecord | EpisodeEnd | Annotation, Field(discriminator="record")])
_SPAN = b'{"record":"span","episode_id":"'
"""How the lines of our own writer begin."""


@dataclass(slots=True)
class Row:
    """An episode in the list."""

    start: dict[str, Any]
    """Its first record."""
    number: int
    """Place in the list, from 0."""
    revision: int
    """When it last changed."""
    end: dict[str, Any] | None = None
    """Its last record."""
    tokens: int = 0
    """Sampled ids."""
    turns: int = 0
    """Policy and tool calls."""
    faults: int = 0
    """Replies that did not parse."""
    failures: int = 0
    """Steps that an exception left."""
    roles: dict[str, None] = field(default_factory=dict)
    """Seats that spoke, in order."""
    path: list[Step] = field(default_factory=list)
    """Nodes in order of writing."""
    unread: int = 0
    """Spans of which only the place is known."""
    walked: bool = False
    """Its path is counted among the graph's."""
    texts: list[str] = field(default_factory=list)
    """Outputs in lower case, for the text filter."""
    places: list[Place] = field(default_factory=list)
    """Its lines."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Its annotations."""

    def values(self) -> list[Any]:
        """The row as FIELDS."""
        start, end = self.start, self.end or {}
        gold = start.get("gold")
        choices = start.get("choices") or ()
        return [
            *(start.get(name) for name in ("episode_id", "group_id", "sample_index", "attempt", "problem_id", "task", "graph", "family")),
            clipped(start.get("question")),
            choices[gold] if isinstance(gold, int) and 0 <= gold < len(choices) else None,
            end.get("status", "unfinished"),
            clipped(end.get("answer")),
            clipped(end.get("error")),
            reward_of(self.notes),
            self.turns,
            self.tokens,
            self.faults,
            self.failures,
            list(self.roles),
            start.get("started_ns", 0) // 1_000_000,
            end["ended_ns"] // 1_000_000 if "ended_ns" in end else None,
            sum(str(note.get("source", "")).startswith("person") for note in self.notes),
        ]


class Index:
    """The rows of a run. Methods may be called from several threads."""

    def __init__(self, run: str | Path) -> None:
        """Raises RunError where the folder is no run of this schema."""
        self.path = Path(run)
        self.info = read_info(self.path)
        self.rows: list[Row] = []
        self.revision = 0
        self.damage: list[str] = []
        """Lines that do not read."""
        self._edges: dict[str, Counter[tuple[str, str, str]]] = {}
        self._by_id: dict[str, Row] = {}
        self._early: dict[str, list[dict[str, Any]]] = {}
        """Annotations of episodes whose beginning was not read yet."""
        self._unread: deque[tuple[Row, Place]] = deque()
        """Spans whose facts were not looked at yet."""
        self._read: dict[Path, int] = {}
        self._torn: set[Path] = set()
        self._lock = threading.RLock()

    def refresh(self, most: int | None = None) -> bool:
        """Reads on, ``most`` bytes or a little more; says whether there was anything to read."""
        with self._lock:
            self.revision += 1
            left = budget = 2**62 if most is None else most
            for folder, take in (("annotations", self._note), ("spans", self._span)):
                for file in sorted((self.path / folder).glob("*.jsonl")):
                    left -= self._file(file, take, left) if left > 0 else 0
            left -= self._look(left)
            self.revision -= left == budget
            return left != budget

    def report(self, fault: str) -> None:
        """Adds to the damage what is not there yet."""
        with self._lock:
            if fault not in self.damage:
                self.damage.append(fault)
                self.revision += 1

    def row(self, episode_id: str) -> Row | None:
        with self._lock:
            return self._by_id.get(episode_id)

    def changes(self, after: int = 0) -> dict[str, Any]:
        """Rows that changed after a revision, and the state of the run."""
        with self._lock:
            changed = [row for row in self.rows if row.revision > after]
            return {
                "revision": self.revision,
                "count": len(self.rows),
                "fields": FIELDS,
                "rows": [[row.number, *row.values()] for row in changed],
                "open": sum(row.end is None for row in self.rows),
                "damage": self.damage[:20],
                "damaged": len(self.damage),
                "torn": len(self._torn),
                "graphs": {graph: [[*edge, count] for edge, count in sorted(edges.items())] for graph, edges in self.edges().items()},
            }

    def edges(self) -> dict[str, Counter[tuple[str, str, str]]]:
        """Of each graph: how often finished episodes went from a node by an edge to a node."""
        with self._lock:
            for row in self._walked():
                self._edges.setdefault(str(row.start.get("graph", "")), Counter()).update(steps_of(row.path))
            return self._edges

    def _walked(self) -> Iterator[Row]:
        for row in self.rows:
            if row.end is not None and row.unread == 0 and not row.walked:
                row.walked = True
                yield row

    def search(self, text: str) -> list[int]:
        """Numbers of the rows in whose outputs a text occurs, in whatever case."""
        wanted = text.lower()
        with self._lock:
            return [row.number for row in self.rows if any(wanted in one for one in row.texts)]

    def _file(self, file: Path, take: Callable[[bytes, Place], None], most: int) -> int:
        at = begun = self._read.get(file, 0)
        if file.stat().st_size == at:
            return 0
        with file.open("rb") as lines:
            lines.seek(at)
            for line in lines:
                if not line.endswith(b"\n"):
                    self._torn.add(file)
                    break
                self._torn.discard(file)
                try:
                    take(line, (file, at, len(line)))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    self.damage.append(f"{file.name}, byte {at}: {type(error).__name__}: {error}"[:300])
                at += len(line)
                if at - begun >= most:
                    break
        self._read[file] = at
        return at - begun

    def _span(self, line: bytes, place: Place) -> None:
        if line.startswith(_SPAN):
            self._step(line[len(_SPAN) : line.index(b'"', len(_SPAN))].decode(), place)
            return
        record = _RECORD.validate_json(line)
        if isinstance(record, EpisodeStart):
            self._begin(record.model_dump()).places.append(place)
        elif isinstance(record, EpisodeEnd):
            row = self._touch(record.episode_id)
            row.end = record.model_dump()
            row.places.append(place)
        elif isinstance(record, SpanRecord):
            self._step(record.episode_id, place)
        else:
            raise ValueError("an annotation among the spans")

    def _step(self, episode_id: str, place: Place) -> None:
        row = self._touch(episode_id)
        row.places.append(place)
        row.turns += 1
        row.unread += 1
        self._unread.append((row, place))

    def _look(self, most: int) -> int:
        """Reads facts of spans whose places are known; returns how many bytes that were."""
        read = 0
        files: dict[Path, IO[bytes]] = {}
        while self._unread and read < most:
            row, (file, at, length) = self._unread.popleft()
            lines = files.setdefault(file, files.get(file) or file.open("rb"))
            lines.seek(at)
            read += length
            try:
                _facts(row, json.loads(lines.read(length)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                self.damage.append(f"{file.name}, byte {at}: {type(error).__name__}: {error}"[:300])
            row.revision = self.revision
            row.unread -= 1
        for lines in files.values():
            lines.close()
        return read

    def _note(self, line: bytes, place: Place) -> None:
        record = Annotation.model_validate_json(line).model_dump()
        key = record["episode_id"]
        if key in self._by_id:
            self._touch(key).notes.append(record)
        else:
            self._early.setdefault(key, []).append(record)

    def _begin(self, record: dict[str, Any]) -> Row:
        if record["episode_id"] in self._by_id:
            raise ValueError(f"episode {record['episode_id'][:40]!r} begins twice")
        row = Row(record, len(self.rows), self.revision, notes=self._early.pop(record["episode_id"], []))
        self.rows.append(row)
        self._by_id[record["episode_id"]] = row
        return row

    def _touch(self, episode_id: str) -> Row:
        row = self._by_id.get(episode_id)
        if row is None:
            raise ValueError(f"a record of episode {episode_id[:40]!r}, which has not begun")
        row.revision = self.revision
        return row


def steps_of(path: Iterable[Step]) -> list[tuple[str, str, str]]:
    """The way from start to end as moves: from a node, by an edge, to a node."""
    moves, at, edge = [], "start", ""
    for _, node, taken in sorted(path, key=lambda step: step[0]):
        moves.append((at, edge, node))
        at, edge = node, taken or ""
    return [*moves, (at, edge, "end")]


def reward_of(notes: Iterable[dict[str, Any]]) -> float | None:
    """The episode's total reward: weight times value over its annotations; None where nobody gave one.

    Of several annotations of one name, source and place the last counts: a second scoring replaces the first. What a person remarks on
    the page has weight 0, so that looking at a run never changes its rewards.
    """
    last: dict[tuple[Any, ...], float] = {}
    for note in notes:
        value, weight, name = note.get("value"), note.get("weight"), str(note.get("name", ""))
        if not isinstance(value, (int, float)) or not isinstance(weight, (int, float)) or not weight:
            continue
        if note.get("scope") == "token" or name.startswith(("advantage", "entropy")):
            continue
        last[name, note.get("source"), note.get("span_id"), note.get("scope"), note.get("role")] = weight * value
    total = sum(last.values())
    return total if last and math.isfinite(total) else None


def clipped(text: Any, longest: int = 300) -> Any:
    """A text of the list, cut: rows must stay small whatever a model wrote."""
    return text if not isinstance(text, str) or len(text) <= longest else text[:longest] + "…"


def _facts(row: Row, span: dict[str, Any]) -> None:
    attributes = span["attributes"]
    row.failures += span["status"] == "error"
    row.faults += names.PARSE_ERROR in attributes
    row.tokens += attributes.get(names.OUTPUT_TOKENS, 0)
    role = attributes.get(names.ROLE)
    if role is not None:
        row.roles[str(role)] = None
    if names.NODE in attributes:
        edge = attributes.get(names.EDGE)
        row.path.append((int(span["seq"]), str(attributes[names.NODE]), None if edge is None else str(edge)))
    said = attributes.get(names.OUTPUT if role is not None else names.TOOL_RESULT)
    if said:
        row.texts.append(str(said)[:SEARCHED].lower())
