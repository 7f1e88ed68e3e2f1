"""Replay: the proof that whoever trains from a run sees what the policy saw when it sampled.

For every recorded call the policy version that sampled it recomputes the log-probs of the sampled ids from the stored prompt ids and the
stored pictures, under the recorded temperature and truncation. Equal numbers mean that ids, order, pictures, processor, positions,
weights and sampling all came through; nearly every way to lose one of them has happened to somebody (pictures dropped on the wire: KL 5.24
in place of 0.001; log-probs off by one: KL 60), and none of those raised an error.

    facts        the loaded engine has the tokenizer, processor, picture grids and weights that were recorded
    replay ROLE  largest |recomputed - recorded| over all sampled tokens of a role, in nats; the worst span is named
    off by one   shifting the recorded log-probs by one place must fit worse
    image swap   another picture must change the log-probs of most calls, else nobody looked

A call in whose middle the weights changed (``PolicyCall.weights``) is recomputed by each version, and each answers for its own tokens; that
is exact where the engine computed the context anew for the new weights, as ours are told to. A call without recorded log-probs (an
oracle's, a hosted chat model's) has nothing to recompute and is counted as such. A token on the very edge of a nucleus may fall to the
other side by rounding; such a call is tried again with top_p moved by 1e-5 either way.
Left out: replay by an engine over the network, which scores untempered distributions only; what a server sampled is replayed in process.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ImageOps
from PIL.Image import Image, Transpose

from monologue.backends.base import Backend, BackendError, Picture, Prompt, Sampling
from monologue.backends.places import UNKNOWN
from monologue.traces.images import PictureError
from monologue.traces.schema import PolicyCall
from monologue.traces.store import RunReader
from monologue.traces.verify import Check

TOLERANCE = 1e-4
"""Nats, for float32 on one machine."""
STRAY = 10
"""How much more than that a single id may differ where the mean is as much less: rounding has a long tail, faults have a large mean."""
EDGE = 1e-5
SWAPPED = 512
"""Calls with pictures that are scored again with another picture."""
CEILING = 100.0
"""Nats; the change of a token that another picture makes impossible."""
TOGETHER = 256
"""Calls in flight, for the engine to batch."""


def agrees(worst: float, mean: float, tolerance: float = TOLERANCE) -> bool:
    """Whether differences of log-probs, nats, are those of rounding: all within the tolerance, or stray ones within ten times as much while
    their mean is a tenth. A picture where attention hangs in the balance made float32 differ from itself by 1.1e-4 between two batches,
    1.9e-6 in the mean.
    """
    return worst <= tolerance or (worst <= STRAY * tolerance and mean <= tolerance / STRAY)


Engines = Callable[[PolicyCall], Backend]
"""The engine that holds the weights which sampled a call; raises BackendError where it cannot be had."""


class Weights:
    """Finds the weights of a call and keeps one engine for each: the folder given for its policy, else a checkpoint of the run that is
    named like the weights version, else the model that the trace names, for its base version.
    """

    def __init__(self, run: Path, given: Mapping[str, str] | None = None, **options: Any) -> None:
        """``given``: folder by policy id, or by ``policy_id@weights_version``; ``options`` go to ``HFBackend``."""
        self._run, self._given, self._options = run, dict(given or {}), options
        self._engines: dict[str, Backend] = {}

    def __call__(self, call: PolicyCall) -> Backend:
        source = self.source(call)
        name = f"{source} {call.habit}" if call.habit else source
        if name not in self._engines:
            self._engines[name] = _engine(source, self._options, call.habit)
        return self._engines[name]

    def source(self, call: PolicyCall) -> str:
        """The folder or Hub name of a call's weights. Raises BackendError."""
        for name in (f"{call.policy_id}@{call.weights_version}", call.policy_id):
            if name in self._given:
                return self._given[name]
        stored = self._run / "checkpoints" / call.policy_id / call.weights_version
        if stored.is_dir():
            return str(stored)
        if call.weights_version.partition(":")[0] == UNKNOWN:
            return call.model
        wanted = f"{call.policy_id}@{call.weights_version}"
        raise BackendError(f"the run has no weights for {wanted!r}; name them with --weights {wanted}=FOLDER")

    async def aclose(self) -> None:
        for engine in self._engines.values():
            await engine.aclose()


def _engine(source: str, options: Mapping[str, Any], habit: str | None) -> Backend:
    try:
        from monologue.backends.hf import HFBackend
        from monologue.backends.latent import Habit
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "tokenizers", "safetensors"):
            raise
        raise BackendError(f"replay needs {error.name}; pip install 'monologue[train]', or verify with --no-replay") from error
    return HFBackend(source, **options, habit=Habit.heard(habit) if habit else None)


@dataclass
class Tally:
    """One role's differences."""

    calls: int = 0
    """Calls replayed."""
    tokens: int = 0
    """Sampled tokens compared."""
    total: float = 0.0
    """Sum of absolute differences."""
    worst: float = 0.0
    """Largest absolute difference."""
    span: str | None = None
    """Where it stands."""
    edges: int = 0
    """Calls that agreed only with top_p moved."""

    def add(self, call: PolicyCall, gaps: Sequence[float], edge: bool) -> None:
        self.calls, self.tokens, self.edges = self.calls + 1, self.tokens + len(gaps), self.edges + edge
        self.total += math.fsum(gaps)
        if max(gaps) > self.worst:
            self.worst, self.span = max(gaps), call.span_id

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0


@dataclass
class Replay:
    """What has been found so far."""

    tolerance: float = TOLERANCE
    roles: dict[str, Tally] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Span and what is wrong there."""
    nothing: Counter[str] = field(default_factory=Counter)
    """Calls without log-probs, by engine."""
    shifts: dict[int, float] = field(default_factory=lambda: {-1: 0.0, 0: 0.0, 1: 0.0})
    """Sum of absolute differences with the recorded log-probs moved by so many places."""
    compared: int = 0
    """Tokens in them."""
    swaps: list[tuple[float, str]] = field(default_factory=list)
    """Largest change in a call by another picture, and its span."""

    def checks(self) -> list[Check]:
        """The table."""
        found = [self._facts(), *(self._role(name, tally) for name, tally in sorted(self.roles.items()))]
        if self.nothing:
            rest = ", ".join(f"{count} of {engine!r}" for engine, count in sorted(self.nothing.items()))
            found.append(Check("not replayed", True, self.nothing.total(), None, f"calls without a model to recompute them: {rest}"))
        if self.compared:
            found.append(self._off_by_one())
        if self.swaps:
            found.append(self._image_swap())
        return found

    def _facts(self) -> Check:
        if not self.faults:
            return Check("facts", True, sum(tally.calls for tally in self.roles.values()))
        span, detail = self.faults[0]
        return Check("facts", False, len(self.faults), span, f"{detail} ({span})")

    def _role(self, name: str, tally: Tally) -> Check:
        ok = agrees(tally.worst, tally.mean, self.tolerance)
        detail = f"{tally.tokens} tokens of {tally.calls} calls, mean {tally.mean:.1e}"
        detail += f", {tally.edges} on the edge of a nucleus" if tally.edges else ""
        where = "" if ok else f"; worst in span {tally.span}"
        return Check(f"replay {name}", ok, tally.worst, None if ok else tally.span, detail + where)

    def _off_by_one(self) -> Check:
        means = {shift: total / self.compared for shift, total in self.shifts.items()}
        best = min(means, key=lambda shift: (means[shift], abs(shift)))
        detail = ", ".join(f"{shift:+d}: {means[shift]:.1e}" for shift in sorted(means))
        if max(means.values()) <= self.tolerance:
            detail += "; too flat to tell"
        worst = next((tally.span for tally in self.roles.values() if not agrees(tally.worst, tally.mean, self.tolerance)), None)
        return Check("off by one", best == 0, means[best], None if best == 0 else worst, f"mean difference by shift: {detail}")

    def _image_swap(self) -> Check:
        mean = math.fsum(change for change, _ in self.swaps) / len(self.swaps)
        floor = 10 * self.tolerance
        unmoved = [span for change, span in self.swaps if change <= self.tolerance]
        detail = f"mean change {mean:.1e} over {len(self.swaps)} calls, {len(unmoved)} unmoved"
        ok = mean > floor and 2 * len(unmoved) <= len(self.swaps)
        return Check("image swap", ok, mean, None if ok or not unmoved else unmoved[0], detail)


def replay(run: str | Path, engines: Engines | None = None, *, tolerance: float = TOLERANCE, calls: int | None = None) -> list[Check]:
    """Replays a run, or ``calls`` calls drawn from all of it, and returns the table of checks. ``engines`` finds a call's weights (default:
    ``Weights`` of the run).

    Raises RunError for a folder that is no run; whatever else is wrong is a breach in the table, with its span.
    """
    return asyncio.run(areplay(run, engines, tolerance=tolerance, calls=calls))


async def areplay(
    run: str | Path, engines: Engines | None = None, *, tolerance: float = TOLERANCE, calls: int | None = None
) -> list[Check]:
    """``replay`` inside an event loop."""
    reader, found = RunReader(run), Replay(tolerance)
    own = Weights(Path(run)) if engines is None else None
    try:
        every = iter(drawn(_recorded(reader, found), calls))
        while some := list(islice(every, TOGETHER)):
            await asyncio.gather(*(_one(reader, engines or own, call, found) for call in some))  # type: ignore[arg-type]
    finally:
        if own is not None:
            await own.aclose()
    return found.checks()


def drawn(every: Iterable[PolicyCall], count: int | None) -> Iterable[PolicyCall]:
    """So many of them, each as likely as any, the same every time (a reservoir: Vitter's algorithm R); all where None."""
    if count is None:
        return every
    kept, dice = list[PolicyCall](), random.Random("replay")
    for number, call in enumerate(every):
        if number < count:
            kept.append(call)
        elif (place := dice.randrange(number + 1)) < count:
            kept[place] = call
    return kept


def _recorded(reader: RunReader, found: Replay) -> Iterator[PolicyCall]:
    """Calls that have log-probs to compare with; the others are counted."""
    for episode in reader.episodes():
        try:
            calls = episode.calls()
        except ValueError as error:
            found.faults.append((episode.start.episode_id, f"prompts cannot be rebuilt: {error}"))
            continue
        for call in calls:
            if call.sampled_logprobs is None or call.engine == "scripted":
                found.nothing[call.engine] += 1
            elif call.sampled_ids:
                yield call


async def _one(reader: RunReader, engines: Engines, call: PolicyCall, found: Replay) -> None:
    try:
        engine = engines(call)
        pictures = tuple(Picture(image.sha256, reader.picture(image.sha256)) for image in call.images)
        found.faults.extend((call.span_id, fault) for fault in _strange(engine, call, pictures))
        new, edge = await _by_version(engines, call, pictures, found.tolerance)
        swapped = None
        if pictures and len(found.swaps) < SWAPPED:
            swapped = await engine.score(Prompt(call.prompt_ids, tuple(map(_other, pictures))), call.sampled_ids, _sampling(call))
    except (BackendError, PictureError, ValueError) as error:
        found.faults.append((call.span_id, str(error)))
        return
    old = call.sampled_logprobs
    assert old is not None
    if len(old) != len(new):
        found.faults.append((call.span_id, f"{len(old)} log-probs are recorded for {len(new)} sampled ids"))
        return
    found.roles.setdefault(call.role, Tally()).add(call, _gaps(old, new), edge)
    if len(new) > 2:
        found.compared += len(new) - 2
        for shift in found.shifts:
            found.shifts[shift] += math.fsum(_gaps(old[1 + shift : len(old) - 1 + shift], new[1:-1]))
    if swapped is not None:
        found.swaps.append((min(CEILING, max(_gaps(swapped, new))), call.span_id))


async def _by_version(
    engines: Engines, call: PolicyCall, pictures: tuple[Picture, ...], tolerance: float
) -> tuple[tuple[float, ...], bool]:
    """Log-probs of each sampled id by the weights that sampled it, and whether they agree only with top_p moved by a hair."""
    n = len(call.sampled_ids)
    parts = call.weights or ((call.weights_version, 0, n),)
    if [0, *(end for _, _, end in parts)] != [*(first for _, first, _ in parts), n]:
        raise ValueError(f"the versions {parts!r} do not share out the {n} sampled ids; a version's part begins where the last one's ends")
    values, moved = list[float](), False
    for version, first, end in parts:
        engine = engines(replace(call, weights_version=version))
        new, edge = await _recompute(engine, call, pictures, tolerance, slice(first, end))
        values, moved = values + list(new[first:end]), moved or edge
    return tuple(values), moved


async def _recompute(
    engine: Backend, call: PolicyCall, pictures: tuple[Picture, ...], tolerance: float, part: slice
) -> tuple[tuple[float, ...], bool]:
    """Log-probs by the engine, and whether those of ``part`` agree only with top_p moved by a hair."""
    prompt, sampling = Prompt(call.prompt_ids, pictures, chosen=call.chosen if call.habit else None), _sampling(call)
    new = await engine.score(prompt, call.sampled_ids, sampling)
    old = call.sampled_logprobs or ()
    if sampling.top_p >= 1 or not sampling.temperature or len(old) != len(new) or max(_gaps(old[part], new[part])) <= tolerance:
        return new, False
    for top_p in (sampling.top_p - EDGE, min(1.0, sampling.top_p + EDGE)):
        again = await engine.score(prompt, call.sampled_ids, replace(sampling, top_p=top_p))
        if max(_gaps(old[part], again[part])) <= tolerance:
            return again, True
    return new, False


def _sampling(call: PolicyCall) -> Sampling:
    facts = call.sampling
    return Sampling(temperature=facts["temperature"], top_p=facts["top_p"] or 1.0, top_k=facts["top_k"] or 0)


def _strange(engine: Any, call: PolicyCall, pictures: Sequence[Picture]) -> Iterator[str]:
    """Recorded facts that the loaded engine does not share."""
    facts = engine.facts
    if facts.tokenizer_hash != call.tokenizer_hash:
        yield f"expected tokenizer {call.tokenizer_hash[:12]}, the weights in {facts.model!r} come with {facts.tokenizer_hash[:12]}"
    versions = {facts.weights_version, call.weights_version}
    if len(versions) == 2 and all(version.startswith(f"{UNKNOWN}:") for version in versions):
        yield f"the call was sampled by the weights {call.weights_version!r}, {facts.model!r} now holds {facts.weights_version!r}"
    for image, picture in zip(call.images, pictures, strict=True):
        room = engine.placeholders(picture.image)
        if engine.processor_hash != image.processor_hash:
            yield f"expected image processor {image.processor_hash[:12]}, the weights come with {engine.processor_hash[:12]}"
        elif (room.grid, room.count) != (image.grid, image.placeholder_count):
            yield f"picture {image.sha256[:12]} had grid {image.grid}, the processor now makes {room.grid}"


def _gaps(old: Sequence[float], new: Sequence[float]) -> list[float]:
    """Absolute differences; two impossible tokens agree, and what is no number agrees with nothing."""
    gaps = [0.0 if a == b else abs(a - b) for a, b in zip(old, new, strict=True)]
    return [math.inf if math.isnan(gap) else gap for gap in gaps]


def _other(picture: Picture) -> Picture:
    """Another picture of the same size: upside down, colours turned round."""
    image: Image = ImageOps.invert(picture.image).transpose(Transpose.ROTATE_180)
    return Picture(picture.sha256, image)
