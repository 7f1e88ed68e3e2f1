"""Plays a graph on problems, many episodes at once, each a trace; engines gather the concurrent calls into batches.

An episode that breaks is recorded as failed and the others go on; only a run folder that cannot be written ends the whole
play. Ctrl-C ends it too: what was finished is on disk already, what was under way is recorded as cancelled. With ``resume`` a
run is continued: whatever ended well is neither repeated nor lost, the rest is played again with the next attempt number and
the same seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monologue.agents.policy import Policy
from monologue.agents.tools import Toolbox
from monologue.graphs.controls import CONTROLS, other_questions, partners
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
    drawn: dict[str, tuple[Picture, ...]] = field(default_factory=dict)
    """Pictures of the latest problems: a group shares them."""

    async def episode(self, job: Job) -> Played:
        """Plays, records and scores one episode. A failure is returned, not raised; RunError and cancellation propagate."""
        started = time.perf_counter()
        try:
            outcome, tokens = await self._run(job)
        except RunError:
            raise
        except Exception as error:
            seconds, failure = time.perf_counter() - started, f"{type(error).__name__}: {error}"
            return replace(played(job.problem, job.sample, job.attempt, "failed"), seconds=seconds, error=failure)
        return replace(
            played(job.problem, job.sample, job.attempt, "ok"),
            answer=outcome.get("answer"),
            score=self.judge(job.problem, outcome.get("answer")),
            turns=len(outcome.get("dialogue", ())),
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )

    async def _run(self, job: Job) -> tuple[Mapping[str, Any], int]:
        problem, partner = job.problem, self.partners.get(job.problem.id)
        with self._record(job, partner) as record:
            context = Context(
                seats={role: self._seated(role, problem, partner or problem) for role in self.seats},
                record=record,
                pictures=self._pictures(record, partner or problem),
                seed=_mix(self.seed, problem.id, job.sample),
                max_turns=self.max_turns,
                toolbox=self.toolbox,
                asks=other_questions(self.control, partner),
            )
            limit = STEPS_PER_TURN * self.max_turns + 10
            start = {"question": problem.question, "choices": list(problem.choices)}
            outcome = await self.graph.compiled().ainvoke(start, context=context, config={"recursion_limit": limit})
            score = self.judge(problem, outcome.get("answer"))
            if score is not None:
                record.annotate(name="exact_match", value=score, scope="episode", source=f"task:{problem.task}")
            record.finish(answer=outcome.get("answer"))
        return outcome, sum(len(stream.ids) for stream in context.streams.values())

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
    config: Mapping[str, Any] | None = None,
    listener: Callable[[Record], None] | None = None,
    capture: Capture = "all",
    redact: Redact | None = None,
) -> Summary:
    """Plays ``samples`` episodes of each problem into the run folder and returns what came of them.

    ``max_turns`` bounds the actions of the seat that concludes. ``score`` is the task's rule. ``config`` is kept in run.json.
    ``listener`` is told of each record once it is on disk. ``capture="shape"`` keeps text, ids and pictures off the disk, ``redact``
    sees every text before it is written.
    Raises GraphError for what does not fit together, RunError where the run cannot be written.
    """
    chosen = find(graph) if isinstance(graph, str) else graph
    _check(chosen, seats, control, samples, concurrency, max_turns)
    if capture not in ("all", "shape"):
        raise GraphError(f"capture must be 'all' or 'shape', got {capture!r}")
    problems = list(problems) if control else problems
    settings = {
        **(config or {}),
        "graph": chosen.name,
        "samples": samples,
        "seed": seed,
        "max_turns": max_turns,
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
    table = Table(chosen, seats, Recorder(writer, capture=capture, redact=redact), score, seed, max_turns, Toolbox(tools), control, pairs)
    summary = Summary()
    total = len(problems) * samples if isinstance(problems, Sized) else None
    try:
        with progress_bar(progress, chosen.name, total) as advance:

            def ended(episode: Played, earlier: bool = False) -> None:
                summary.add(episode, earlier)
                advance(episode)

            await _all(concurrency, _jobs(problems, samples, done, table, ended), table, ended)
    finally:
        if writer is not run:
            writer.close()
    return summary


def _named(seat: Seat) -> str:
    """The policy in a seat and its weights, as run.json knows them."""
    if not isinstance(seat, Policy):
        return "oracle"
    return f"{seat.policy_id}@{seat.backend.facts.weights_version}"


def _check(graph: Graph, seats: Mapping[str, Seat], control: str | None, samples: int, concurrency: int, max_turns: int) -> None:
    missing, extra = set(graph.roles) - set(seats), set(seats) - set(graph.roles)
    if missing:
        raise GraphError(f"graph {graph.name!r} needs a policy for {', '.join(sorted(missing))}; got {sorted(seats)}")
    if extra:
        raise GraphError(f"graph {graph.name!r} has no seat for {', '.join(sorted(extra))}; its seats are {', '.join(graph.roles)}")
    check_control(graph, control)
    for name, value in (("samples", samples), ("concurrency", concurrency), ("max_turns", max_turns)):
        if value < 1:
            raise GraphError(f"{name} must be at least 1, got {value!r}")


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
