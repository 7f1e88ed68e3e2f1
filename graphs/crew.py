"""Several processes that play one run together, each with engines of its own: what a machine with many cores is good for.

Engines in one process share Python's lock, so a second core does little for them. A crew loads the policies once per process and keeps
them; a play is dealt out problem by problem (``aplay(part=(k, n))``), and every process writes into the same run folder, which the store
allows. Nothing of an episode depends on who plays it: seeds come from the problem, so a run is the same with one process or eight.

    crew = Crew(partial(make_seats, ...), processes=4)      make_seats() -> {role: policy}, importable by name
    crew.play("monologue", problems, "runs/first")          a Summary, as of play(); the crew can play again

Left out: policies on servers, which serve many episodes from one process as it is; a listener, since each process has its own records.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import multiprocessing
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from monologue.agents.policy import close
from monologue.graphs.oracle import Seat
from monologue.graphs.play import aplay
from monologue.graphs.state import GraphError
from monologue.graphs.summary import Played, Summary, progress_bar
from monologue.tasks.base import Problem
from monologue.traces.store import RunError

Seats = Mapping[str, Seat]
HERE = ("listener", "redact", "progress", "part")
"""Options of ``play`` that do not travel to other processes, or that the crew sets itself."""


class Here:
    """What a process of a crew keeps."""

    seats: Seats
    fault: Exception | None = None
    line: Line


@dataclass(frozen=True)
class Line:
    """What connects the processes."""

    ended: Any
    """Queue of ended episodes."""
    gate: Any
    """Barrier: each process takes its own of as many calls as there are processes."""
    stop: Any
    """Set where all should stop playing."""


def _start(make: Callable[[], Seats], line: Line) -> None:
    """Runs once in each process. What goes wrong is told by ``_ready``, since an initializer that raises says nothing to its parent."""
    Here.line = line
    try:
        Here.seats = make()
    except Exception as error:
        Here.fault = error
    gc.collect()
    gc.freeze()  # a full collection looks through all of torch and transformers: a quarter of a second in the middle of a play


def _ready() -> None:
    if Here.fault is not None:
        Here.line.gate.abort()
        raise Here.fault
    Here.line.gate.wait()


def _part(graph: str, problems: Sequence[Problem], run: Path, part: tuple[int, int], options: dict[str, Any]) -> Summary:
    return asyncio.run(_stoppable(aplay(graph, problems, Here.seats, run, part=part, progress=False, ended=Here.line.ended.put, **options)))


async def _stoppable(playing: Coroutine[Any, Any, Summary]) -> Summary:
    """Cancelled as Ctrl-C would: what is under way is recorded so."""
    task, loop = asyncio.ensure_future(playing), asyncio.get_running_loop()

    def watch() -> None:
        while not task.done():
            if Here.line.stop.wait(0.2):
                with contextlib.suppress(RuntimeError):  # it ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
                return

    threading.Thread(target=watch, daemon=True).start()
    return await task


def _end() -> None:
    Here.line.gate.wait()
    asyncio.run(close(Here.seats.values()))


class Crew:
    """A context manager; closing it ends its processes."""

    def __init__(self, make: Callable[[], Seats], processes: int) -> None:
        """``make`` is called once in every process, so it must be importable by name (a function of a module, or ``partial`` of one).

        Returns when every process has its policies; raises what ``make`` raises there.
        """
        if processes < 1:
            raise GraphError(f"processes must be at least 1, got {processes!r}")
        context = multiprocessing.get_context("spawn")
        self.processes, self._line = processes, Line(context.SimpleQueue(), context.Barrier(processes), context.Event())
        self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(make, self._line))
        try:
            with _ignored_interrupts():  # processes inherit that: Ctrl-C is the parent's to hear
                ready = [self._pool.submit(_ready) for _ in range(processes)]
            faults = [one.exception() for one in ready]
            for fault in sorted(filter(None, faults), key=lambda fault: isinstance(fault, threading.BrokenBarrierError)):
                raise fault
        except BaseException:
            self._pool.shutdown(wait=True, cancel_futures=True)
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(BrokenProcessPool):  # a process died: there is nobody left to say goodbye
            for end in [self._pool.submit(_end) for _ in range(self.processes)]:
                end.result()
        self._pool.shutdown(wait=True)
        self._line.ended.close()

    def play(
        self,
        graph: str,
        problems: Sequence[Problem],
        run: str | Path,
        *,
        concurrency: int = 64,
        samples: int = 1,
        progress: bool = True,
        **options: Any,
    ) -> Summary:
        """As ``graphs.play.play``; ``concurrency`` is that of all processes together. Raises GraphError, RunError."""
        if here := [name for name in HERE if options.get(name) is not None]:
            raise GraphError(f"{here[0]!r} does not travel to other processes; play in one")
        options |= {"samples": samples, "concurrency": -(-concurrency // self.processes)}
        parts = [(number, self.processes) for number in range(self.processes)]
        with progress_bar(progress, graph, len(problems) * samples) as advance, self._heard(advance):
            playing = [self._pool.submit(_part, graph, list(problems), Path(run), part, options) for part in parts]
            try:
                found = [one.result() for one in playing]
            except KeyboardInterrupt:
                self._line.stop.set()
                concurrent.futures.wait(playing)
                raise
            except BrokenProcessPool as error:
                raise RunError(
                    f"a process of the crew died; what was finished is kept, and the same play goes on in {str(run)!r}"
                ) from error
        return Summary([episode for part in found for episode in part.episodes], sum(part.skipped for part in found))

    @contextmanager
    def _heard(self, advance: Callable[[Played], None]) -> Iterator[None]:
        """Hands on what the processes tell of ended episodes."""

        def listen() -> None:
            while (episode := self._line.ended.get()) is not None:
                advance(episode)

        listener = threading.Thread(target=listen, name="crew", daemon=True)
        listener.start()
        try:
            yield
        finally:
            self._line.ended.put(None)
            listener.join()


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
