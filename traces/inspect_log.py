"""A run as an ``.eval`` log, for ``inspect view``: the best reader of dialogues that needs no account and no server of ours.

A sample is a problem, an epoch one of its episodes; where one was played again, the last attempt is shown and the others are counted. Both
seats speak in one conversation, each message under its span's id; a look or a tool call is a tool call, what came back its result. What was
said about the episode are scores, what was said about single steps stands in the metadata, beside the ids by which everything is found in
the run again. Token ids and log-probs are left out: inspect has no place that shows them.

Samples are written one by one with inspect's own recorder, a class that it does not document but uses itself; its documented function wants
all of them in memory at once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monologue.traces import names
from monologue.traces.extras import ExportError, need
from monologue.traces.images import REFERENCE
from monologue.traces.schema import Annotation, SpanRecord
from monologue.traces.store import Episode, RunReader

NOT_CAPTURED = "(not captured)"
FLUSH_EVERY = 20
"""Samples that are held in memory at most."""
Key = tuple[str, int, str, str]


@dataclass
class Tally:
    """Mean of a score, as samples go by."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value

    def metrics(self) -> dict[str, float]:
        mean = self.total / self.count
        spread = max(0.0, self.squares / self.count - mean * mean) * self.count / max(1, self.count - 1)
        return {"mean": mean, "stderr": math.sqrt(spread / self.count)}


@dataclass
class Survey:
    """What must be known before the first sample is written."""

    last: dict[Key, str] = field(default_factory=dict)
    """The episode to be shown, by problem, sample, graph, control."""
    attempts: dict[Key, int] = field(default_factory=dict)
    """How often each was begun before."""
    episodes: int = 0
    """All of them."""
    tasks: set[str] = field(default_factory=set)
    """Tasks that were played."""

    @property
    def kinds(self) -> set[tuple[str, str]]:
        """Graphs and controls that were played."""
        return {(graph, control) for _, _, graph, control in self.last}


def to_inspect(run: str | Path, file: str | Path) -> int:
    """Writes the log; returns the number of samples. Raises ExportError, RunError."""
    need("inspect_ai.log", "inspect")
    target = Path(file)
    if target.suffix != ".eval":
        raise ExportError(f"expected a file name that ends in .eval, got {str(target)!r}")
    part = target.with_name(f".{secrets.token_hex(4)}.part.eval")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        count = asyncio.run(_Log(RunReader(run)).write(part))
        os.replace(part, target)
    except OSError as error:
        told = f"cannot write the log {str(target)!r}: {error.strerror}; name a file in a folder that you may write to"
        raise ExportError(told) from error
    finally:
        with suppress(OSError):
            part.unlink()
    return count


def _survey(reader: RunReader) -> Survey:
    found = Survey()
    for episode in reader.episodes():
        start, key = episode.start, _key(episode)
        found.episodes += 1
        found.tasks.add(start.task)
        if start.attempt >= found.attempts.get(key, 0):
            found.last[key], found.attempts[key] = start.episode_id, start.attempt
    return found


def _key(episode: Episode) -> Key:
    start = episode.start
    return start.problem_id, start.sample_index, start.graph, str(start.extra.get("control") or "")


class _Log:
    """One log being written."""

    def __init__(self, reader: RunReader) -> None:
        self.reader, self.survey = reader, _survey(reader)
        self.log, self.model, self.scorer = (need(f"inspect_ai.{name}", "inspect") for name in ("log", "model", "scorer"))
        self.tools = need("inspect_ai.tool", "inspect")
        self.tallies: dict[str, Tally] = {}
        self.completed = 0

    async def write(self, file: Path) -> int:
        if not self.survey.episodes:
            raise ExportError(f"the run {str(self.reader.path)!r} holds no episodes yet; play some first")
        recorder = need("inspect_ai.log._recorders.eval", "inspect").EvalRecorder(str(file.parent))
        spec = self._spec()
        await recorder.log_init(spec, location=str(file), clean=True)
        await recorder.log_start(spec, self.log.EvalPlan())
        count = 0
        for episode in self.reader.episodes():
            if self.survey.last[_key(episode)] == episode.start.episode_id:
                await recorder.log_sample(spec, self.log.condense_sample(self._sample(episode)))
                count += 1
                if count % FLUSH_EVERY == 0:
                    await recorder.flush(spec)
        await recorder.log_finish(spec, "success", self.log.EvalStats(), self._results(count), None, None, header_only=True)
        return count

    def _spec(self) -> Any:
        info, survey = self.reader.info, self.survey
        problems = sorted({self._label(key) for key in survey.last})
        task, graphs = " ".join(sorted(survey.tasks)), " ".join(sorted({graph for graph, _ in survey.kinds}))
        return self.log.EvalSpec(
            eval_id=info["run_id"],
            run_id=info["run_id"],
            task_id=info["run_id"],
            created=info["created"].replace("Z", "+00:00"),
            task=task,
            dataset=self.log.EvalDataset(name=task, samples=len(problems), sample_ids=problems),
            model=f"monologue/{graphs}",
            config=self.log.EvalConfig(epochs=max(key[1] for key in survey.last) + 1),
            metadata={**info["config"], "superseded_attempts": survey.episodes - len(survey.last)},
        )

    def _label(self, key: Key) -> str:
        problem, _, graph, control = key
        return problem if len(self.survey.kinds) == 1 else f"{problem} ({graph}{', ' + control if control else ''})"

    def _sample(self, episode: Episode) -> Any:
        start, end = episode.start, episode.end
        whole = [note for note in episode.annotations if note.span_id is None]
        steps = [note for note in episode.annotations if note.span_id is not None]
        self.completed += episode.complete
        stopped = _moment(end.ended_ns) if end else None
        ids = start.model_dump(include={"run_id", "episode_id", "group_id", "task", "graph", "family", "attempt", "extra"})
        return self.log.EvalSample(
            id=self._label(_key(episode)),
            epoch=start.sample_index + 1,
            input=start.question or NOT_CAPTURED,
            choices=list(start.choices) or None,
            target="" if start.gold is None else start.choices[start.gold],
            messages=_Dialogue(self).messages(episode),
            output=self.model.ModelOutput.from_content(f"monologue/{start.graph}", (end.answer if end else None) or ""),
            scores=self._scores(whole, end.answer if end else None),
            metadata={**ids, "annotations": [note.model_dump(mode="json") for note in steps]},
            model_usage=self._usage(episode),
            started_at=_moment(start.started_ns),
            completed_at=stopped,
            total_time=(end.ended_ns - start.started_ns) / 1e9 if end else None,
            error=self._error(episode),
        )

    def _error(self, episode: Episode) -> Any:
        if episode.complete:
            return None
        told = "the episode never ended" if episode.end is None else episode.end.error or episode.end.status
        return need("inspect_ai._util.error", "inspect").EvalError(message=told, traceback=told, traceback_ansi=told)

    def _scores(self, notes: Sequence[Annotation], answer: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for note in notes:
            name = note.name if note.name not in found else f"{note.name} ({note.source}, {len(found)})"
            value = note.value if note.value is not None else note.text or note.scope
            facts = {"weight": note.weight, "scope": note.scope, "role": note.role, "source": note.source}
            found[name] = self.scorer.Score(value=value, answer=answer, explanation=note.text, metadata=facts)
            if note.value is not None:
                self.tallies.setdefault(note.name, Tally()).add(note.value)
        return found

    def _results(self, count: int) -> Any:
        scores = [
            self.log.EvalScore(
                name=name,
                scorer=name,
                metrics={kind: self.log.EvalMetric(name=kind, value=value) for kind, value in tally.metrics().items()},
            )
            for name, tally in sorted(self.tallies.items())
        ]
        return self.log.EvalResults(total_samples=count, completed_samples=self.completed, scores=scores)

    def _usage(self, episode: Episode) -> dict[str, Any]:
        sums: dict[str, list[int]] = {}
        for span in episode.spans:
            if names.POLICY in span.attributes:
                used = sums.setdefault(str(span.attributes[names.POLICY]), [0, 0])
                used[0] += int(span.attributes.get(names.INPUT_TOKENS, 0))
                used[1] += int(span.attributes.get(names.OUTPUT_TOKENS, 0))
        return {
            name: self.model.ModelUsage(input_tokens=heard, output_tokens=said, total_tokens=heard + said)
            for name, (heard, said) in sums.items()
        }


class _Dialogue:
    """The messages of one episode: what each seat heard and said, in order."""

    def __init__(self, log: _Log) -> None:
        self.model, self.tools, self.images = log.model, log.tools, log.reader.path / "images"
        self._asked: dict[str, Any] = {}
        self._told: str | None = None

    def messages(self, episode: Episode) -> list[Any]:
        """All of them."""
        return [message for span in episode.spans for message in (self._call(span) if span.kind == "policy" else self._tool(span))]

    def _call(self, span: SpanRecord) -> Iterator[Any]:
        facts = span.attributes
        stream = str(facts.get(names.STREAM, ""))
        for number, heard in enumerate(json.loads(str(facts.get(names.INPUT_MESSAGES, "[]")))):
            message = self._heard(heard, stream, f"{span.span_id}-{number}", span)
            if message is not None:
                yield message
        calls = self._calls(span, stream)
        said = str(facts.get(names.OUTPUT, facts.get(names.ERROR, NOT_CAPTURED)))
        policy = str(facts.get(names.POLICY, ""))
        yield self.model.ChatMessageAssistant(id=span.span_id, content=said, model=policy, tool_calls=calls or None, metadata=_facts(span))

    def _heard(self, heard: Mapping[str, Any], stream: str, key: str, span: SpanRecord) -> Any:
        parts = [self._part(part) for part in heard["parts"]]
        role = heard["role"]
        if role == "tool":
            call = self._asked.pop(stream, None)
            text = "".join(part.text for part in parts if part.type == "text")
            if text == self._told:
                self._told = None
                return None
            return self.model.ChatMessageTool(
                id=key,
                content=parts,
                tool_call_id=call.id if call else None,
                function=call.function if call else None,
                metadata=_facts(span),
            )
        kind = {"system": self.model.ChatMessageSystem, "assistant": self.model.ChatMessageAssistant}.get(role, self.model.ChatMessageUser)
        return kind(id=key, content=parts, metadata=_facts(span))

    def _part(self, part: Mapping[str, Any]) -> Any:
        picture = REFERENCE.fullmatch(str(part.get("uri", "")))
        if picture:
            return self.model.ContentImage(image=self._picture(picture[1]))
        if part.get("type") == "choices":
            return self.model.ContentText(text="\n".join(f"- {choice}" for choice in part["choices"]))
        return self.model.ContentText(text=str(part["content"]) if "content" in part else json.dumps(part, ensure_ascii=False))

    def _picture(self, sha256: str) -> str:
        try:
            return "data:image/png;base64," + base64.b64encode((self.images / f"{sha256}.png").read_bytes()).decode()
        except OSError as error:
            raise ExportError(f"the run lacks the picture {sha256[:12]}: {error.strerror}; nothing can be shown without it") from error

    def _calls(self, span: SpanRecord, stream: str) -> list[Any]:
        action = json.loads(str(span.attributes.get(names.ACTION, "{}")))
        if action.get("kind") not in ("look", "tool"):
            return []
        given = {name: value for name, value in action.items() if name not in ("kind", "name", "arguments")}
        function, arguments = (action["name"], action["arguments"]) if action["kind"] == "tool" else ("look", given)
        self._asked[stream] = self.tools.ToolCall(id=f"call-{span.span_id}", function=function, arguments=arguments)
        return [self._asked[stream]]

    def _tool(self, span: SpanRecord) -> Iterator[Any]:
        name = str(span.attributes.get(names.TOOL_NAME, span.name))
        asked = next((call for call in self._asked.values() if call.function == name), None)
        self._told = str(span.attributes.get(names.TOOL_RESULT, span.attributes.get(names.ERROR, NOT_CAPTURED)))
        yield self.model.ChatMessageTool(
            id=span.span_id, content=self._told, tool_call_id=asked.id if asked else None, function=name, metadata=_facts(span)
        )


def _facts(span: SpanRecord) -> dict[str, Any]:
    wanted = {"role": names.ROLE, "node": names.NODE, "edge": names.EDGE, "policy": names.POLICY, "weights": names.WEIGHTS}
    found = {name: span.attributes[key] for name, key in wanted.items() if key in span.attributes}
    return {"span_id": span.span_id, "seq": span.seq, **found}


def _moment(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat()
