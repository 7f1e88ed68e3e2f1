"""Concurrent requests, gathered into batches that one worker thread runs.

An episode awaits one call at a time, so a batch comes from many episodes being played at once. The worker waits until a short window
passes without a new request (a longer one where many were asking), takes what is queued, and runs it; whatever arrives meanwhile is the
next batch. Requests keep their order, and only requests of one type (generate, score, load) share a batch, so ``load`` is a clean border
between two weights.

    submit ──► queue ──► worker: gather ──► run(batch) ──► each ticket is resolved as soon as its own answer stands

A ticket belongs to the event loop that submitted it, the worker to none, so one engine may serve many loops one after another.
The thread ends by itself when there is nothing to do: an engine that nobody closed is still collected. Left out: joining a
batch that already runs (continuous batching); SGLang does that better than this would.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from monologue.backends.base import BackendError, BackendTimeout, BackendUnavailable

Job = TypeVar("Job")
Result = TypeVar("Result")


class Ticket(Generic[Job, Result]):
    """One request on its way. ``resolve`` and ``fail`` may be called from the worker; the first of them counts."""

    def __init__(self, job: Job, size: int) -> None:
        self.job, self.size, self._settled = job, size, False
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Result] = self._loop.create_future()

    @property
    def dropped(self) -> bool:
        """Nobody waits for it any more."""
        return self._settled or self.future.cancelled()

    def resolve(self, result: Result) -> None:
        self._settle(lambda: self.future.set_result(result))

    def fail(self, error: BackendError) -> None:
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, answer: Callable[[], None]) -> None:
        if self.dropped:
            return
        self._settled = True
        with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody is left to hear the answer
            self._loop.call_soon_threadsafe(lambda: None if self.future.done() else answer())


class Batcher(Generic[Job, Result]):
    """Calls ``run(tickets)`` in a thread of its own. It resolves or fails each; what it raises fails those still open."""

    def __init__(
        self,
        run: Callable[[list[Ticket[Job, Result]]], None],
        *,
        name: str,
        max_batch: int = 64,
        max_tokens: int = 65536,
        window: float = 0.001,
        timeout: float | None = None,
        idle: float = 1.0,
    ) -> None:
        """A batch holds at most ``max_batch`` requests and, padded, ``max_tokens`` tokens; the times are in seconds."""
        if max_batch < 1 or max_tokens < 1:
            raise ValueError(f"max_batch and max_tokens must be at least 1, got {max_batch!r} and {max_tokens!r}")
        self._run, self._name, self._window, self._timeout, self._idle = run, name, window, timeout, idle
        self._max_batch, self._max_tokens = max_batch, max_tokens
        self._queue: deque[Ticket[Job, Result]] = deque()
        self._running: list[Ticket[Job, Result]] = []
        self._last: dict[type, int] = {}  # size of the last batch of each type
        self._arrived = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def submit(self, job: Job, size: int = 1, *, timeless: bool = False) -> Result:
        """Waits for the job's result; ``size`` is the most tokens it can come to. Cancelling it gives up its place."""
        ticket: Ticket[Job, Result] = Ticket(job, size)
        with self._arrived:
            if self._closed:
                raise BackendUnavailable(f"{self._name} is closed; make another engine")
            self._queue.append(ticket)
            self._arrived.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
        try:
            return await asyncio.wait_for(ticket.future, None if timeless else self._timeout)
        except TimeoutError as error:
            raise BackendTimeout(f"{self._name} gave no answer within {self._timeout} s; allow more time or fewer tokens") from error

    async def aclose(self) -> None:
        """Turns away what waits or runs, and returns when the worker has stopped. Closing twice is harmless."""
        with self._arrived:
            self._closed = True
            for ticket in (*self._queue, *self._running):
                ticket.fail(BackendUnavailable(f"{self._name} was closed before it answered"))
            self._queue.clear()
            self._arrived.notify()
            thread = self._thread
        if thread is not None:
            await asyncio.to_thread(thread.join)

    def _work(self) -> None:
        while batch := self._next():
            try:
                self._run(batch)
                error = BackendError(f"{self._name} returned from a batch of {len(batch)} without an answer to this request")
            except Exception as cause:  # the border of the worker: it must outlive whatever a model does
                error = BackendError(f"{self._name} failed on a batch of {len(batch)}: {type(cause).__name__}: {cause}")
                error.__cause__ = cause
                if all(ticket.dropped for ticket in batch):  # nobody is left to be told
                    logging.getLogger(__name__).error("%s", error, exc_info=cause)
            for ticket in batch:
                ticket.fail(error)

    def _next(self) -> list[Ticket[Job, Result]]:
        """The next batch; empty when the worker should end."""
        while self._wait():
            self._gather()
            with self._arrived:
                self._running = self._take()
                if self._running:
                    self._last[type(self._running[0].job)] = len(self._running)
                    return self._running
        return []

    def _wait(self) -> bool:
        with self._arrived:
            self._running = []
            if not self._queue and not self._closed:
                self._arrived.wait(self._idle)
            if not self._queue:
                self._thread = None
            return bool(self._queue)

    def _gather(self) -> None:
        """Waits while requests keep coming: a lone caller one window, many callers up to eight, which fuller batches pay back."""
        with self._arrived:
            last = self._last.get(type(self._queue[0].job), 1) if self._queue else 1
        patience = self._window * min(8, max(1, last // 4))
        for _ in range(10):
            seen = len(self._queue)
            if seen >= self._max_batch:
                return
            time.sleep(patience)
            if len(self._queue) == seen:
                return

    def _take(self) -> list[Ticket[Job, Result]]:
        batch: list[Ticket[Job, Result]] = []
        longest = 0
        while self._queue and len(batch) < self._max_batch:
            ticket = self._queue[0]
            padded = max(longest, ticket.size) * (len(batch) + 1)
            if batch and (type(ticket.job) is not type(batch[0].job) or padded > self._max_tokens):
                break
            self._queue.popleft()
            if not ticket.dropped:
                batch.append(ticket)
                longest = max(longest, ticket.size)
        return batch
