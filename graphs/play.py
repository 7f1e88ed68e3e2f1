"""Plays a graph on problems, many episodes at once, each a trace; engines gather the concurrent calls into batches.

An episode that breaks is recorded as failed and the others go on; only a run folder that cannot be written ends the whole
play. Ctrl-C ends it too: what was finished is on disk already, what was under way is recorded as cancelled. With ``resume`` a
run is continued: whatever ended well is neither repeated nor lost, the rest is played again with the next attempt number and
the same seed. Where an engine could not be reached or did not answer in time, ``retries`` plays the episode again at once, as a
whole; ``deadline`` bounds an attempt however its calls fare. Each attempt is a trace of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monologue.agents.policy import Policy, Usage
from monologue.agents.tools import Toolbox
from monologue.backends.base import BackendTimeout, BackendUnavailable
from monologue.graphs.controls import CONTROLS, other_questions, partners, shown
from monologue.graphs.oracle import Seat
from monologue.graphs.registry import Graph, find
from monologue.graphs.state import Context, GraphError
from monologue.graphs.summary import Earlier, Played, Summary, earlier, met_again, played, progress_bar
from monologue.tasks.base import Problem, exact_match
from monologue.traces.images import Picture
from monologue.traces.privacy import Capture, Redact
from monologue.traces.recorder import EpisodeRecorder, Recorder
from monologue.traces.schema import Record
from monologue.traces.store import RunError, RunWriter

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

STEPS_PER_TURN = 3
DRAWN = 64
"""Problems whose pictures are kept."""
PASSING = (BackendUnavailable, BackendTimeout)
"""Failures after which an episode may be played again."""


class EpisodeTimeout(Exception):
    """An episode took longer than its deadline."""


@dataclass(frozen=True)
class Job:
    """One episode to be played."""

    problem: Problem
    """The problem."""
    sample: int
    """Which of the problem's samples, from 0."""
    attempt: int
    """How often it was begun before."""


@dataclass(frozen=True)
class Table:
    """Everything that the episodes of a play share."""

    graph: Graph
    seats: Mapping[str, Seat]
    recorder: Recorder
    score: Callable[[Problem, str | None], float]
    seed: int
    max_turns: int
    toolbox: Toolbox
    control: str | None
    partners: Mapping[str, Problem] = field(default_factory=dict)
    deadline: float | None = None
    retries: int = 0
    weight: float = 1.0
    drawn: dict[str, tuple[Picture, ...]] = field(default_factory=dict)
    """Pictures of the latest problems: a group shares them."""

    async def episode(self, job: Job) -> Played:
        """Plays, records and scores one episode, again where that may help; the last attempt is returned."""
        for again in range(self.retries + 1):
            last, passing = await self._attempt(replace(job, attempt=job.attempt + again))
            if not passing:
                break
        return last

    async def _attempt(self, job: Job) -> tuple[Played, bool]:
        """One attempt, and whether it failed for a reason that may pass. Failures are returned; RunError and cancellation propagate."""
        started = time.perf_counter()
        try:
            outcome, usage = await self._run(job)
        except RunError:
            raise
        except Exception as error:
            seconds, failure = time.perf_counter() - started, f"{type(error).__name__}: {error}"
            failed = replace(played(job.problem, job.sample, job.attempt, "failed"), seconds=seconds, error=failure)
            return failed, isinstance(error, PASSING)
        ended = replace(
            played(job.problem, job.sample, job.attempt, "ok"),
            answer=outcome.get("answer"),
            score=self.judge(job.problem, outcome.get("answer")),
            turns=len(outcome.get("dialogue", ())),
            tokens=sum(calls[-1].total for calls in usage if calls),
            usage=tuple(call for calls in usage for call in calls),
            seconds=time.perf_counter() - started,
        )
        return ended, False

    async def _run(self, job: Job) -> tuple[Mapping[str, Any], list[list[Usage]]]:
        problem, partner = job.problem, self.partners.get(job.problem.id)
        seen = shown(self.control, problem, partner)
        with self._record(job, partner) as record:
            context = Context(
                seats={role: self._seated(role, problem, seen) for role in self.seats},
                record=record,
                pictures=self._pictures(record, seen),
                seed=_mix(self.seed, problem.id, job.sample),
                max_turns=self.max_turns,
                toolbox=self.toolbox,
                asks=other_questions(self.control, partner),
            )
            limit = STEPS_PER_TURN * self.max_turns + 10
            start = {"question": problem.question, "choices": list(problem.choices)}
            outcome = await self._in_time(self.graph.compiled().ainvoke(start, context=context, config={"recursion_limit": limit}))
            score = self.judge(problem, outcome.get("answer"))
            if score is not None:
                record.annotate(name="exact_match", value=score, weight=self.weight, scope="episode", source=f"task:{problem.task}")
            record.finish(answer=outcome.get("answer"))
        return outcome, [stream.usage for stream in context.streams.values()]

    async def _in_time(self, episode: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Its outcome. Raises EpisodeTimeout where it is not there by the deadline; whatever was under way is cancelled then."""
        task = asyncio.ensure_future(episode)
        try:
            done, _ = await asyncio.wait([task], timeout=self.deadline)
            if done:
                return task.result()
            raise EpisodeTimeout(f"the episode did not end within its deadline of {self.deadline:g} s")
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _pictures(self, record: EpisodeRecorder, problem: Problem) -> tuple[Picture, ...]:
        """Painted and stored for the first episode of a problem, and at hand for the others that follow."""
        if problem.id not in self.drawn:
            if len(self.drawn) >= DRAWN:
                del self.drawn[next(iter(self.drawn))]
            self.drawn[problem.id] = tuple(record.store(picture()) for picture in problem.pictures)
        return self.drawn[problem.id]

    def _record(self, job: Job, partner: Problem | None) -> Any:
        problem = job.problem
        extra = {} if self.control is None else {"control": self.control, "partner": partner.id if partner else None}
        return self.recorder.episode(
            problem_id=problem.id,
            task=problem.task,
            graph=self.graph.name,
            group_id=problem.id,
            sample_index=job.sample,
            attempt=job.attempt,
            question=problem.question,
            choices=problem.choices,
            gold=problem.gold,
            family=problem.family,
            extra=extra,
        )

    def _seated(self, role: str, problem: Problem, shown: Problem) -> Policy:
        """The policy of a role; whoever sees the picture is seated for the problem that is shown."""
        seat = self.seats[role]
        return seat if isinstance(seat, Policy) else seat(self.graph, shown if role == "answerer" else problem, role)

    def judge(self, problem: Problem, answer: str | None) -> float | None:
        return None if problem.gold is None else self.score(problem, answer)


def _mix(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def play(
    graph: str | Graph, problems: Iterable[Problem], seats: Mapping[str, Seat], run: str | Path | RunWriter, **options: Any
) -> Summary:
    """``aplay`` for callers without an event loop. KeyboardInterrupt propagates after the episodes under way were recorded as
    cancelled.
    """
    return asyncio.run(aplay(graph, problems, seats, run, **options))


async def aplay(
    graph: str | Graph,
    problems: Iterable[Problem],
    seats: Mapping[str, Seat],
    run: str | Path | RunWriter,
    *,
    samples: int = 1,
    concurrency: int = 64,
    seed: int = 0,
    max_turns: int = 8,
    resume: bool = True,
    progress: bool = True,
    control: str | None = None,
    tools: Sequence[BaseTool] = (),
    score: Callable[[Problem, str | None], float] = exact_match,
    weight: float = 1.0,
    deadline: float | None = None,
    retries: int = 0,
    config: Mapping[str, Any] | None = None,
    listener: Callable[[Record], None] | None = None,
    capture: Capture = "all",
    redact: Redact | None = None,
    part: tuple[int, int] = (0, 1),
    ended: Callable[[Played], None] | None = None,
) -> Summary:
    """Plays ``samples`` episodes of each problem into the run folder and returns what came of them.

    ``max_turns`` bounds the actions of the seat that concludes. ``score`` is the task's rule, ``weight`` what its figure counts among an
    episode's rewards. ``deadline`` (seconds) bounds an attempt; ``retries`` is how often an episode is played again whose engine could not
    be reached or did not answer. ``config`` is kept in run.json. ``listener`` is told of each record once it is on disk.
    ``capture="shape"`` keeps text, ids and pictures off the disk, ``redact`` sees every text before it is written. ``part=(k, n)`` plays
    every n-th problem from the k-th on, so that n processes or machines share a run. ``ended`` is told what came of each episode.
    Raises GraphError for what does not fit together, RunError where the run cannot be written.
    """
    chosen = find(graph) if isinstance(graph, str) else graph
    _check(chosen, seats, control, samples=samples, concurrency=concurrency, max_turns=max_turns)
    _check_options(part, deadline, retries, capture)
    if control == "random-questions" and not isinstance(seats["answerer"], Policy):
        raise GraphError("an oracle recites the replies to its own questions whatever it is asked; with random-questions seat a policy")
    problems = list(problems) if control else problems
    settings = {
        **(config or {}),
        "graph": chosen.name,
        "samples": samples,
        "seed": seed,
        "max_turns": max_turns,
        "weight": weight,
        "control": control,
        "capture": capture,
        "seats": {role: _named(seats[role]) for role in chosen.roles},
    }
    pairs = partners(problems, seed) if isinstance(problems, list) and control else {}
    for partner in pairs.values():
        other_questions(control, partner)
    done = earlier(run, settings) if resume else {}
    writer = run if isinstance(run, RunWriter) else RunWriter(Path(run), settings, resume=resume)
    writer.listener = listener or writer.listener
    recorder = Recorder(writer, capture=capture, redact=redact)
    table = Table(chosen, seats, recorder, score, seed, max_turns, Toolbox(tools), control, pairs, deadline, retries, weight)
    summary = Summary()
    total = len(range(part[0], len(problems), part[1])) * samples if isinstance(problems, Sized) else None
    mine = islice(problems, part[0], None, part[1])
    try:
        with progress_bar(progress, chosen.name, total) as advance:

            def note(episode: Played, earlier: bool = False) -> None:
                summary.add(episode, earlier)
                advance(episode)
                if ended is not None:
                    ended(episode)

            await _all(concurrency, _jobs(mine, samples, done, table, note), table, note)
    finally:
        if writer is not run:
            writer.close()
    return summary


def _named(seat: Seat) -> str:
    """The policy in a seat and its weights, as run.json knows them."""
    if not isinstance(seat, Policy):
        return "oracle"
    return f"{seat.policy_id}@{seat.backend.facts.weights_version}"


def _check(graph: Graph, seats: Mapping[str, Seat], control: str | None, **counts: int) -> None:
    missing, extra = set(graph.roles) - set(seats), set(seats) - set(graph.roles)
    if missing:
        raise GraphError(f"graph {graph.name!r} needs a policy for {', '.join(sorted(missing))}; got {sorted(seats)}")
    if extra:
        raise GraphError(f"graph {graph.name!r} has no seat for {', '.join(sorted(extra))}; its seats are {', '.join(graph.roles)}")
    check_control(graph, control)
    for name, value in counts.items():
        if value < 1:
            raise GraphError(f"{name} must be at least 1, got {value!r}")


def _check_options(part: tuple[int, int], deadline: float | None, retries: int, capture: str) -> None:
    first, step = part
    if not 0 <= first < step:
        raise GraphError(f"part must be (k, n) with 0 <= k < n, got {part!r}")
    if retries < 0 or (deadline is not None and deadline <= 0):
        raise GraphError(f"expected retries of 0 or more and a deadline above 0 s, got {retries!r} and {deadline!r}")
    if capture not in ("all", "shape"):
        raise GraphError(f"capture must be 'all' or 'shape', got {capture!r}")


def check_control(graph: Graph, control: str | None) -> None:
    """Raises GraphError where a graph cannot be played under a control."""
    if control is not None and control not in CONTROLS:
        raise GraphError(f"unknown control {control!r}; choose from {', '.join(CONTROLS)}")
    if control is not None and control not in graph.controls:
        raise GraphError(f"control {control!r} has no meaning in graph {graph.name!r}, which allows {', '.join(graph.controls) or 'none'}")


def _jobs(
    problems: Iterable[Problem],
    samples: int,
    done: Mapping[tuple[str, int], Earlier],
    table: Table,
    ended: Callable[[Played, bool], None],
) -> Iterator[Job]:
    """What is left to play; ``ended`` is told of each episode that ended well before."""
    for problem in problems:
        for sample in range(samples):
            before = done.get((problem.id, sample))
            if before is not None and before.ended is not None:
                score = table.judge(problem, before.ended.answer) if before.captured else before.ended.score
                ended(met_again(before.ended, problem, score), True)
            else:
                yield Job(problem, sample, before.attempts if before else 0)


async def _all(concurrency: int, jobs: Iterator[Job], table: Table, done: Callable[[Played], object]) -> None:
    """Workers share one iterator, so problems are made when they are needed; an error that propagates stops all of them."""

    async def worker() -> None:
        for job in jobs:
            done(await table.episode(job))

    workers = [asyncio.ensure_future(worker()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
