"""Gathering, order, budgets, failures, and the end of the worker."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from monologue.backends.base import BackendError, BackendTimeout, BackendUnavailable, RequestRefused
from monologue.backends.batching import Batcher, Ticket


class Recorder:
    """Resolves each job with itself and notes the batches; waits at the gate when there is one."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.batches: list[list[Any]] = []
        self.gate = gate

    def __call__(self, tickets: list[Ticket[Any, Any]]) -> None:
        self.batches.append([ticket.job for ticket in tickets])
        if self.gate is not None:
            self.gate.wait()
        for ticket in tickets:
            if ticket.job == "bad":
                ticket.fail(RequestRefused("bad"))
            elif ticket.job == "bug":
                raise ZeroDivisionError("a bug")
            elif ticket.job != "forgotten":
                ticket.resolve(ticket.job)


def batcher(run: Recorder, **settings: Any) -> Batcher[Any, Any]:
    return Batcher(run, name="test engine", **settings)


async def test_concurrent_requests_share_a_batch_and_keep_their_order() -> None:
    run = Recorder()
    engine = batcher(run, window=0.05)
    assert await asyncio.gather(*map(engine.submit, range(20))) == list(range(20))
    assert run.batches == [list(range(20))]
    await engine.aclose()


async def test_a_wait_for_more_is_as_long_as_the_last_batch_of_its_own_kind_was_large() -> None:
    run = Recorder()
    engine = batcher(run, window=0.05)
    await asyncio.gather(*map(engine.submit, range(32)))
    await engine.submit("load")
    first = asyncio.ensure_future(engine.submit(1))
    await asyncio.sleep(0.12)  # more than one window, less than eight
    await asyncio.gather(first, engine.submit(2))
    assert run.batches[1:] == [["load"], [1, 2]]
    await engine.aclose()


async def test_batches_respect_rows_padded_tokens_and_types() -> None:
    run = Recorder()
    engine = batcher(run, window=0.05, max_batch=3, max_tokens=10)
    await asyncio.gather(*[engine.submit(job, size) for job, size in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 6), (6, 99), ("x", 1), (7, 1)]])
    assert run.batches == [[1, 2, 3], [4], [5], [6], ["x"], [7]]
    await engine.aclose()


async def test_a_refusal_or_a_bug_reaches_its_own_requests_and_the_worker_goes_on() -> None:
    engine = batcher(Recorder(), window=0.05)
    good, bad = await asyncio.gather(engine.submit("good"), engine.submit("bad"), return_exceptions=True)
    assert good == "good" and isinstance(bad, RequestRefused)
    with pytest.raises(BackendError, match=r"test engine failed.*a bug") as caught:
        await engine.submit("bug")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(BackendError, match="without an answer"):
        await engine.submit("forgotten")
    assert await engine.submit("good") == "good"
    await engine.aclose()


async def test_what_is_cancelled_or_late_in_the_queue_is_never_run() -> None:
    gate = threading.Event()
    run = Recorder(gate)
    engine = batcher(run, timeout=0.05)
    first = asyncio.create_task(engine.submit("first"))
    while not run.batches:
        await asyncio.sleep(0)
    cancelled, late = asyncio.create_task(engine.submit("cancelled")), asyncio.create_task(engine.submit("late"))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(BackendTimeout):
        await late
    with pytest.raises(BackendTimeout):
        await first
    gate.set()
    assert await engine.submit("last") == "last"
    assert run.batches == [["first"], ["last"]]
    await engine.aclose()


async def test_closing_turns_away_what_waits_and_what_comes() -> None:
    gate = threading.Event()
    run = Recorder(gate)
    engine = batcher(run)
    running = asyncio.create_task(engine.submit("running"))
    while not run.batches:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(engine.submit("waiting"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(engine.aclose())
    for task in (running, waiting):
        with pytest.raises(BackendUnavailable):
            await task
    gate.set()
    await closing
    with pytest.raises(BackendUnavailable):
        await engine.submit("more")
    await engine.aclose()


def test_one_engine_serves_one_event_loop_after_another_and_its_thread_ends_when_idle() -> None:
    engine = batcher(Recorder(), idle=0.01)
    assert [asyncio.run(engine.submit(job)) for job in "ab"] == ["a", "b"]
    thread = engine._thread
    if thread is not None:
        thread.join()
    assert engine._thread is None
    assert asyncio.run(engine.submit("c")) == "c"
