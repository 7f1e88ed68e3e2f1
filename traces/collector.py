"""Spans to a collector (Phoenix, Jaeger, any OTLP receiver), from a stored run or live while it is played.

    send(run, "http://127.0.0.1:6006")                        a run as it lies
    Forwarder(run, "http://127.0.0.1:6006")                   a listener: finished episodes leave from a thread of their own

The official exporters carry the bytes; what they lack is added. They report a lost batch in a log and go on: here it is an error. They
batch by number of spans and drop what is larger than the receiver takes: here batches end at 2 MiB, half of what a gRPC receiver accepts
by default. Viewers do not know our references to pictures nor our kinds of message parts: pictures go as base64 blobs, the rest as text.

The exporters' own batch processor is left out of live play too. It would hold spans of pictures that are not yet resolved, and says nothing
when its queue is full; the forwarder counts what it drops and never waits: the run on disk comes first.
"""

from __future__ import annotations

import base64
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from monologue.traces import names
from monologue.traces.extras import ExportError, need
from monologue.traces.images import REFERENCE
from monologue.traces.schema import Annotation, Attribute, EpisodeEnd, EpisodeStart, Record, SpanRecord
from monologue.traces.spans import PROJECT, Span, root_span, step_span
from monologue.traces.store import Episode, RunReader

Protocol: TypeAlias = Literal["http", "grpc"]
LARGEST_BATCH = 2 * 2**20
"""Bytes."""
MOST_SPANS = 512
KINDS = {"policy": "LLM", "tool": "TOOL", "node": "CHAIN"}


def send(
    run: str | Path, endpoint: str, protocol: Protocol = "http", project: str = "monologue", headers: Mapping[str, str] | None = None
) -> int:
    """All episodes of a stored run; returns the number of spans. Raises ExportError where one did not arrive, RunError for a bad run.

    ``headers`` are for receivers that want a key; without them the exporters take OTEL_EXPORTER_OTLP_HEADERS.
    """
    reader = RunReader(run)
    with Collector(reader.path, endpoint, protocol, project, headers=headers) as collector:
        return sum(collector.send(batch) for batch in batches(s for e in reader.episodes() for s in collector.spans_of(e)))


class Collector:
    """A receiver of spans; pictures are read from the run's folder."""

    def __init__(
        self,
        run: Path,
        endpoint: str,
        protocol: Protocol = "http",
        project: str = "monologue",
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Raises ExportError where the extra is missing or nobody listens."""
        self.endpoint, self._images = endpoint, run / "images"
        self._exporter = _exporter(endpoint, protocol, {"timeout": timeout, "headers": headers})
        reachable(endpoint, protocol)
        self._resource = Resource({"service.name": "monologue", PROJECT: project})
        self._scope = InstrumentationScope("monologue", schema_url=names.SCHEMA_URL)
        self._blob = lru_cache(maxsize=16)(self._read_blob)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends a call under way, too."""
        self._exporter.shutdown()

    def spans_of(self, episode: Episode) -> Iterator[Span]:
        """An episode as viewers want it: the root first, pictures inline. Raises ExportError where a picture is missing."""
        key = episode.start.episode_id
        for span in (root_span(episode.start, episode.end, episode.annotations), *map(step_span, episode.spans)):
            kind = KINDS.get(str(span.attributes.get(names.KIND)), "AGENT")
            facts = {**span.attributes, "session.id": key, "openinference.span.kind": kind}
            if names.INPUT_MESSAGES in facts:
                facts[names.INPUT_MESSAGES] = self._shown(str(facts[names.INPUT_MESSAGES]))
            yield replace(span, attributes=facts)

    def send(self, spans: list[Span]) -> int:
        """One batch; returns its size. Raises ExportError where it did not arrive."""
        with _overheard() as told:
            result = self._exporter.export([self._readable(span) for span in spans])
        if result.name != "SUCCESS":
            why = "; ".join(told) or "the exporter does not say why"
            raise ExportError(f"{len(spans)} spans did not reach {self.endpoint}: {why}")
        return len(spans)

    def _shown(self, messages: str) -> str:
        said = json.loads(messages)
        return json.dumps([{**one, "parts": [self._part(part) for part in one["parts"]]} for one in said], ensure_ascii=False)

    def _part(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        picture = REFERENCE.fullmatch(str(part.get("uri", "")))
        if picture:
            return {"type": "blob", "modality": "image", "mime_type": "image/png", "content": self._blob(picture[1])}
        if part.get("type") == "choices":
            return {"type": "text", "content": "\n".join(f"- {choice}" for choice in part["choices"])}
        if part.get("type") == "action":
            return {"type": "text", "content": json.dumps(part["action"], ensure_ascii=False)}
        return part

    def _read_blob(self, sha256: str) -> str:
        try:
            return base64.b64encode((self._images / f"{sha256}.png").read_bytes()).decode()
        except OSError as error:
            raise ExportError(f"the run lacks the picture {sha256[:12]}: {error.strerror}; nothing can be shown without it") from error

    def _readable(self, span: Span) -> ReadableSpan:
        return ReadableSpan(
            name=span.name,
            context=_context(span.trace_id, span.span_id),
            parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
            resource=self._resource,
            attributes=dict(span.attributes),
            events=[Event(event.name, dict(event.attributes), event.time_ns) for event in span.events],
            kind=SpanKind.CLIENT if span.client else SpanKind.INTERNAL,
            status=Status(StatusCode.OK) if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def batches(spans: Iterable[Span], largest: int = LARGEST_BATCH, most: int = MOST_SPANS) -> Iterator[list[Span]]:
    """Spans in order, in batches that a receiver takes; a span that is larger than a batch goes alone."""
    batch: list[Span] = []
    held = 0
    for span in spans:
        size = _size(span)
        if batch and (held + size > largest or len(batch) == most):
            yield batch
            batch, held = [], 0
        batch.append(span)
        held += size
    if batch:
        yield batch


def _size(span: Span) -> int:
    """Bytes on the way, not less."""
    told = (span.attributes, *(event.attributes for event in span.events))
    return 200 + sum(len(name) + 16 + _length(value) for facts in told for name, value in facts.items())


def _length(value: Attribute) -> int:
    if not isinstance(value, str):
        return 0
    return len(value) if value.isascii() else 4 * len(value)


def _exporter(endpoint: str, protocol: Protocol, options: Mapping[str, Any]) -> Any:
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ExportError(f"expected an address such as http://127.0.0.1:4318, got {endpoint!r}")
    if protocol == "grpc":
        module = need("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "otlp")
        return module.OTLPSpanExporter(endpoint=endpoint, insecure=url.scheme == "http", **options)
    module = need("opentelemetry.exporter.otlp.proto.http.trace_exporter", "otlp")
    whole = endpoint if url.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
    return module.OTLPSpanExporter(endpoint=whole, **options)


def reachable(endpoint: str, protocol: Protocol = "http") -> None:
    """Raises ExportError where nobody listens: the exporters would try again for half a minute first."""
    url = urlsplit(endpoint)
    port = url.port or (4317 if protocol == "grpc" else 443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise ExportError(f"nobody listens at {endpoint} ({error.strerror or error}); start the collector, or mend the address") from error


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What the exporters say in their log, which is the only place where they give a reason."""
    told: list[str] = []
    logger = logging.getLogger("opentelemetry.exporter.otlp")
    ear = logging.Handler(logging.WARNING)
    ear.emit = lambda record: told.append(record.getMessage().splitlines()[0])  # type: ignore[method-assign]
    before = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.removeHandler(ear)
        logger.propagate = before


class Forwarder:
    """A listener of a run being written: hands each finished episode to a collector, in a thread of its own.

    Nothing here waits or raises while the run is written. An episode that the queue has no room for is dropped and counted, and so is one
    that did not arrive; ``close`` tells.
    """

    def __init__(self, run: Path, endpoint: str, protocol: Protocol = "http", project: str = "monologue", depth: int = 256) -> None:
        """Raises ExportError where the extra is missing or nobody listens."""
        self.sent = self.dropped = self.failed = self.late = self._handed = 0
        self._why = ""
        self._collector = Collector(run, endpoint, protocol, project, timeout=10.0)
        self._open: dict[str, Episode] = {}
        self._queue: queue.Queue[Episode | None] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._work, name="monologue-otlp", daemon=True)
        self._thread.start()

    def __call__(self, record: Record) -> None:
        """One record that is on disk."""
        if isinstance(record, EpisodeStart):
            self._open[record.episode_id] = Episode(record)
            return
        episode = self._open.get(getattr(record, "episode_id", ""))
        if episode is None:
            self.late += isinstance(record, Annotation)
        elif isinstance(record, SpanRecord):
            episode.spans.append(record)
        elif isinstance(record, Annotation):
            episode.annotations.append(record)
        elif isinstance(record, EpisodeEnd):
            episode.end = record
            self._hand_over(self._open.pop(record.episode_id))

    def _hand_over(self, episode: Episode) -> None:
        try:
            self._queue.put_nowait(episode)
            self._handed += 1
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        while (episode := self._queue.get()) is not None:
            try:
                for batch in batches(self._collector.spans_of(episode)):
                    self._collector.send(batch)
                self.sent += 1
            except Exception as error:  # the run goes on, whatever a collector does; close() tells
                self.failed += 1
                self._why = str(error)

    def close(self, timeout: float = 30.0) -> str:
        """Waits so long for what is under way, then says in one line what came of it."""
        deadline = time.monotonic() + timeout
        with suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        unfinished = self._handed - self.sent - self.failed
        self._collector.close()
        told = f"{self.sent} episodes sent to {self._collector.endpoint}"
        lost = {
            "dropped because the queue was full": self.dropped,
            "did not arrive": self.failed,
            f"not sent within {timeout:.0f} seconds": unfinished,
            "annotations came too late": self.late,
        }
        told += "".join(f", {count} {what}" for what, count in lost.items() if count)
        return told + (f"; last error: {self._why}" if self._why else "")
