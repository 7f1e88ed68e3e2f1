"""Records as the spans that other tools know: names and messages of OpenTelemetry's GenAI conventions, rewards as evaluation events.

An episode becomes a root span of its own, since most viewers show a trace by its root: the question as input, the answer as output, what
was said about it later as ``gen_ai.evaluation.result`` events, the only place that the conventions have for a reward.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from monologue.traces import names
from monologue.traces.schema import Annotation, Attribute, EpisodeEnd, EpisodeStart, SpanEvent, SpanRecord

PROJECT = "openinference.project.name"
EVALUATED = "gen_ai.evaluation.result"


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
    broken = "the episode never ended" if end is None else None if end.status == "ok" else end.error or end.status
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
