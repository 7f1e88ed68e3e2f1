"""Rewards beside the spans in Phoenix: it shows evaluation events as text, and filters and averages only its own annotations.

They are posted to its REST interface, so nothing but Python is needed. Posting waits until the server says they are stored, and tries again
while the spans, which it takes in behind its queue, are not there yet. An annotation keeps its identifier, so a second export of the same
run replaces the first and doubles nothing. An episode's annotations go to its root span.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from monologue.traces.collector import reachable, send
from monologue.traces.extras import ExportError
from monologue.traces.images import digest
from monologue.traces.schema import Annotation
from monologue.traces.store import RunReader

AT_ONCE = 200
PATIENCE = 60.0
"""Seconds that the spans may take to appear."""


def to_phoenix(run: str | Path, endpoint: str, project: str = "monologue") -> tuple[int, int]:
    """Spans, then annotations; returns how many of each. Raises ExportError where something did not arrive."""
    spans = send(run, endpoint, "http", project, _key())
    return spans, annotate(run, endpoint)


def annotate(run: str | Path, endpoint: str) -> int:
    """The run's annotations onto spans that are there. Raises ExportError where they are not, or are refused."""
    reachable(endpoint)
    plain, count = _plain(RunReader(run)), 0
    while batch := list(islice(plain, AT_ONCE)):
        _post(f"{endpoint.rstrip('/')}/v1/span_annotations?sync=true", {"data": batch})
        count += len(batch)
    return count


def _plain(reader: RunReader) -> Iterator[dict[str, Any]]:
    for episode in reader.episodes():
        for note in episode.annotations:
            yield _annotation(note, note.span_id or episode.start.root_span_id)


def _annotation(note: Annotation, span_id: str) -> dict[str, Any]:
    facts = {"weight": note.weight, "scope": note.scope, "role": note.role, "source": note.source, "values": note.values}
    label = note.scope if note.value is None and note.text is None else None
    return {
        "span_id": span_id,
        "name": note.name,
        "annotator_kind": "CODE",
        "identifier": digest(note.model_dump_json().encode())[:16],
        "result": {"score": note.value, "explanation": note.text, "label": label},
        "metadata": {name: value for name, value in facts.items() if value is not None},
    }


def _key() -> dict[str, str] | None:
    """For a Phoenix that wants one."""
    key = os.environ.get("PHOENIX_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else None


def _post(url: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json", **(_key() or {})})
    until = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(request, timeout=PATIENCE).close()
            return
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            if error.code != 404 or "do not exist" not in told or time.monotonic() > until:
                raise ExportError(f"Phoenix refused the annotations ({error.code}): {told[:300]}") from error
        except OSError as error:
            raise ExportError(f"the annotations did not reach {url}: {error}") from error
        time.sleep(0.5)
