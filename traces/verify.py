"""Is a run complete and consistent? Every check names the first span that breaks it.

    records        every line reads, in this schema; torn last lines of killed processes are counted, and are a breach where no later
                   attempt made good what they broke
    episodes       each one that began has ended, and not as failed or cancelled, unless a later attempt ended well; none ended twice
    spans          as many policy calls and spans as the episode's end says, sequence numbers without gap, times in order
    parents        every span's parent is the root or another span of the episode
    prefix         each prompt begins with all its stream had before; breaks are counted by cause
    lengths        ids, log-probs and mask of a call have one length; log-probs are finite and not above zero
    placeholders   each picture's placeholders lie in the prompt as one run of the model's one id, a whole number of patches each, and
                   that id stands nowhere else in it
    pictures       each picture is stored, decodes, has its hash and its size
    content        each call that ended well has its ids, or says why they were not captured; how many were not is told

The check that recomputes log-probs (replay) needs the policy and stands elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from monologue.traces import names
from monologue.traces.images import PictureError, decode, digest
from monologue.traces.privacy import IDS, SAID
from monologue.traces.schema import PolicyCall
from monologue.traces.store import Episode, RunError, RunReader


@dataclass(frozen=True, slots=True)
class Check:
    """One rule and whether the run keeps it."""

    name: str
    """The rule."""
    ok: bool
    """It holds."""
    figure: float
    """How many things were looked at; for a breach, how many broke the rule."""
    span: str | None = None
    """Span or episode of the first breach."""
    detail: str | None = None
    """What was found."""


Breach = tuple[str, str]
"""Span or episode id, and what is wrong there."""
Key = tuple[str, str, str, int]
"""What a play plays once: graph, control, problem, sample."""


def verify(run: str | Path) -> list[Check]:
    """All checks. Raises RunError where the folder is no run of this schema."""
    reader = RunReader(run)
    inspection = Inspection(reader)
    try:
        for episode in reader.episodes():
            inspection.look(episode)
    except RunError as error:
        return [Check("records", False, 1, None, str(error)), *inspection.checks()]
    checks, made_good = inspection.checks(), inspection.superseded
    told = f"{reader.torn} torn last lines" if reader.torn else None
    held = reader.torn <= made_good
    return [Check("records", held, inspection.seen["records"] if held else reader.torn, None, told), *checks]


class Inspection:
    """Counts and breaches, rule by rule, as episodes go by."""

    RULES = ("episodes", "spans", "parents", "prefix", "lengths", "placeholders", "pictures", "content")

    def __init__(self, reader: RunReader) -> None:
        self.reader = reader
        self.seen: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.first: dict[str, Breach] = {}
        self.breaks: Counter[str] = Counter()
        self.withheld: Counter[str] = Counter()
        self.superseded = 0
        """Attempts that failed or never ended, and a later one ended well; known once ``checks`` was asked."""
        self._pictures: dict[str, str | None] = {}
        self._ended: Counter[Key] = Counter()
        self._broken_off: list[tuple[Key, Breach]] = []
        self._placeholder: dict[tuple[str, str], int] = {}

    def look(self, episode: Episode) -> None:
        """One episode through all rules."""
        self.seen["records"] += 1 + len(episode.spans) + (episode.end is not None)
        self._apply("episodes", 1, self._well(episode))
        self._apply("spans", len(episode.spans), _counted(episode))
        self._apply("parents", len(episode.spans), _parented(episode))
        self.withheld.update(str(span.attributes[names.CAPTURE]) for span in episode.spans if names.CAPTURE in span.attributes)
        self._apply("content", sum(span.kind == "policy" for span in episode.spans), _held(episode))
        try:
            calls = episode.calls()
        except (ValueError, KeyError) as error:
            self._apply("prefix", 1, iter([(episode.start.episode_id, f"prompts cannot be rebuilt: {error}")]))
            return
        self.breaks.update(call.prefix_break for call in calls if call.prefix_break)
        self._apply("prefix", len(calls), _prefixed(calls))
        self._apply("lengths", len(calls), _measured(calls))
        self._apply("placeholders", sum(len(call.images) for call in calls), self._placed(calls))
        self._apply("pictures", sum(len(call.images) for call in calls), self._stored(calls))

    def _apply(self, rule: str, count: int, breaches: Iterator[Breach]) -> None:
        self.seen[rule] += count
        for breach in breaches:
            self.broken[rule] += 1
            self.first.setdefault(rule, breach)

    def _well(self, episode: Episode) -> Iterator[Breach]:
        """Whether the episode ended well; what did not is judged at the end, when later attempts are known."""
        start, end = episode.start, episode.end
        key = (start.graph, str(start.extra.get("control")), start.problem_id, start.sample_index)
        if end is None:
            self._broken_off.append((key, (start.episode_id, "the episode never ended")))
        elif end.status != "ok":
            self._broken_off.append((key, (start.episode_id, f"the episode {end.status}: {end.error}".rstrip(": "))))
        else:
            self._ended[key] += 1
            if self._ended[key] > 1:
                yield start.episode_id, f"sample {start.sample_index} of {start.problem_id!r} was played to its end twice"

    def _judge(self) -> None:
        for key, breach in self._broken_off:
            if self._ended[key]:
                self.superseded += 1
            else:
                self._apply("episodes", 0, iter([breach]))
        self._broken_off = []

    def _placed(self, calls: list[PolicyCall]) -> Iterator[Breach]:
        for call in calls:
            own = (call.model, call.tokenizer_hash)
            for image in call.images:
                run = call.prompt_ids[image.placeholder_start : image.placeholder_start + image.placeholder_count]
                fault = _misplaced(run, image.placeholder_count, math.prod(image.grid))
                if fault is None and self._placeholder.setdefault(own, run[0]) != run[0]:
                    fault = f"the placeholder of {call.model!r} is {self._placeholder[own]}, this picture has {run[0]}"
                if fault:
                    yield call.span_id, f"{fault} (picture {image.sha256[:12]})"
            held = sum(image.placeholder_count for image in call.images)
            found = call.prompt_ids.count(self._placeholder[own]) if own in self._placeholder else held
            if found != held:
                yield call.span_id, f"{found} placeholders in the prompt, but pictures for {held}"

    def _stored(self, calls: list[PolicyCall]) -> Iterator[Breach]:
        for call in calls:
            for image in call.images:
                if image.sha256 not in self._pictures:
                    self._pictures[image.sha256] = self._picture_fault(image.sha256, image.width, image.height)
                fault = self._pictures[image.sha256]
                if fault:
                    yield call.span_id, fault

    def _picture_fault(self, sha256: str, width: int, height: int) -> str | None:
        file = self.reader.path / "images" / f"{sha256}.png"
        if not file.is_file():
            return f"picture {sha256[:12]} is missing"
        data = file.read_bytes()
        if digest(data) != sha256:
            return f"picture {sha256[:12]} has other bytes than its name says"
        try:
            size = decode(data, sha256[:12]).size
        except PictureError as error:
            return str(error)
        return None if size == (width, height) else f"picture {sha256[:12]} is {size}, the call saw {(width, height)}"

    def checks(self) -> list[Check]:
        """One Check per rule."""
        self._judge()
        return [self._check(rule) for rule in self.RULES]

    def _note(self, rule: str) -> str | None:
        if rule == "episodes" and self.superseded:
            return f"{self.superseded} attempts were broken off and played again"
        counts = {"prefix": self.breaks, "content": self.withheld}.get(rule)
        if not counts:
            return None
        told = ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items()))
        return f"breaks: {told}" if rule == "prefix" else f"not captured, so not checked: {told}"

    def _check(self, rule: str) -> Check:
        broken = self.broken[rule]
        if not broken:
            return Check(rule, True, self.seen[rule], None, self._note(rule))
        span, detail = self.first[rule]
        return Check(rule, False, broken, span, f"{detail} ({span})")


def _held(episode: Episode) -> Iterator[Breach]:
    for span in episode.spans:
        mark, facts = span.attributes.get(names.CAPTURE), span.attributes
        if mark is None and span.kind == "policy" and span.status == "ok" and names.SAMPLED_IDS not in facts:
            yield span.span_id, "the call ended well, but has no ids"
        found = [name for name in (IDS + SAID if mark == "shape" else IDS if mark else ()) if name in facts]
        if found or (mark and facts.get(names.TRAINABLE)):
            yield span.span_id, f"its content was not to be captured ({mark}), but it has {', '.join(found) or 'leave to be trained on'}"


def _counted(episode: Episode) -> Iterator[Breach]:
    key = episode.start.episode_id
    for expected, span in enumerate(episode.spans):
        if span.seq != expected:
            yield span.span_id, f"expected span number {expected} of the episode, found {span.seq}"
            break
        if span.end_ns < span.start_ns:
            yield span.span_id, "the span ends before it starts"
    if episode.end is not None:
        calls = sum(span.kind == "policy" for span in episode.spans)
        if (calls, len(episode.spans)) != (episode.end.calls, episode.end.spans):
            yield (
                key,
                f"{episode.end.calls} policy calls and {episode.end.spans} spans were written, {calls} and {len(episode.spans)} are here",
            )


def _parented(episode: Episode) -> Iterator[Breach]:
    known = {episode.start.root_span_id, *(span.span_id for span in episode.spans)}
    for span in episode.spans:
        if span.parent_id not in known:
            yield span.span_id, f"its parent {span.parent_id} is not in the episode"
        if span.trace_id != episode.start.episode_id:
            yield span.span_id, f"it belongs to trace {span.trace_id}"


def _prefixed(calls: list[PolicyCall]) -> Iterator[Breach]:
    streams: dict[str, int] = {}
    for call in calls:
        before = streams.get(call.stream)
        if before is None and call.prefix_length is not None:
            yield call.span_id, "a stream's first call shares a prefix with a call that is not here"
        if before is not None and call.prefix_length != before and call.prefix_break is None:
            yield (
                call.span_id,
                f"the prompt shares {call.prefix_length} ids with its stream, which had {before}, and no cause is given",
            )
        streams[call.stream] = len(call.prompt_ids) + len(call.sampled_ids)


def _measured(calls: list[PolicyCall]) -> Iterator[Breach]:
    for call in calls:
        n = len(call.sampled_ids)
        if len(call.loss_mask) != n or set(call.loss_mask) - {0, 1}:
            yield call.span_id, f"{n} sampled ids but a mask of {len(call.loss_mask)}"
        if call.sampled_logprobs is not None:
            if len(call.sampled_logprobs) != n:
                yield call.span_id, f"{n} sampled ids but {len(call.sampled_logprobs)} log-probs"
            if any(not math.isfinite(value) or value > 0 for value in call.sampled_logprobs):
                yield call.span_id, "a log-prob is above zero or not finite"
        if call.sampled_entropies is not None:
            if len(call.sampled_entropies) != n:
                yield call.span_id, f"{n} sampled ids but {len(call.sampled_entropies)} entropies"
            if any(not math.isfinite(value) or value < 0 for value in call.sampled_entropies):
                yield call.span_id, "an entropy is below zero or not finite"


def _misplaced(run: tuple[int, ...], count: int, patches: int) -> str | None:
    """What is wrong with one picture's placeholders."""
    if len(run) != count or count < 1 or len(set(run)) != 1:
        return f"expected {count} equal placeholders, found {len(set(run))} kinds in {len(run)}"
    if patches and (patches % count or math.isqrt(patches // count) ** 2 != patches // count):
        return f"{count} placeholders are no whole number of merged patches of a grid of {patches}"
    return None
