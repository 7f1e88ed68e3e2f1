"""JSON over HTTP to a policy server: deadlines, bounded retries with jitter on what can be retried, errors that name server and request.

Everything runs on an event loop of its own in a background thread, so an engine serves callers on any loop, one after another or at once,
and its connections outlive each of them. A caller that is cancelled cancels its request here. The client is aiohttp's: httpx looks through
its whole pool at every request, which with 64 under way was half of all that this process did.

    connection refused, lost; 502, 503, 504              BackendUnavailable, tried again with growing, jittered waits
    cut off in mid-request                               the same, but a request that has cut ``CUTS`` connections may be what kills the
                                                         server, and is not sent again
    other 5xx                                            BackendError (the server choked on this very request; it would again)
    no answer in time                                    BackendTimeout, not tried again: the deadline is the caller's whole patience
    4xx                                                  RequestRefused
    an answer that is no JSON object                     BackendError
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from typing import Any, TypeAlias, TypeVar

from monologue.backends.base import BackendError, BackendTimeout, BackendUnavailable, RequestRefused

T = TypeVar("T")
Heard: TypeAlias = "Callable[[dict[str, Any]], None]"
PASSING = (502, 503, 504)
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
"""Seconds before the first retry, and at most."""
CUTS = 5
KEEP_ALIVE = 4.0
"""Seconds that an idle connection is kept; a server closes it after five."""


class _CutOff(BackendUnavailable):
    """The connection broke after the request was sent."""


class Loop:
    """An event loop in a thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs it there; for callers that wait without a loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it there and waits for it here; cancelled here, it is cancelled there. The caller's loop may close before that is done."""
        here, there = asyncio.get_running_loop(), self.submit(coroutine)
        waiting: asyncio.Future[T] = here.create_future()

        def tell(done: Future[T]) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed, so nobody waits
                here.call_soon_threadsafe(_settle, waiting, done)

        there.add_done_callback(tell)
        try:
            return await waiting
        finally:
            there.cancel()

    def stop(self) -> None:
        """Ends the thread; what still runs is cancelled."""
        if self._thread.is_alive():
            self.submit(_cancel_others()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _settle(waiting: asyncio.Future[T], done: Future[T]) -> None:
    if waiting.done():
        return
    if done.cancelled():
        waiting.cancel()
    elif error := done.exception():
        waiting.set_exception(error)
    else:
        waiting.set_result(done.result())


class Wire:
    """Requests to one server, at most ``limit`` generations at once; what steers the server never queues behind them."""

    def __init__(self, url: str, *, limit: int, attempts: int, bounded: tuple[str, ...] = ("/generate",)) -> None:
        import aiohttp

        self.url, self._attempts = url.rstrip("/"), attempts
        pool = aiohttp.TCPConnector(limit=limit + 4, keepalive_timeout=KEEP_ALIVE)
        self._client = aiohttp.ClientSession(connector=pool, timeout=aiohttp.ClientTimeout(total=None, sock_connect=None))
        self._places, self._bounded = asyncio.Semaphore(limit), bounded
        self.retried = 0
        """Requests that were sent again."""

    async def get(self, path: str, *, timeout: float) -> dict[str, Any]:
        """The JSON object at ``path``. Raises BackendError."""
        return await self._often("GET", path, None, timeout, path)

    async def post(
        self,
        path: str,
        body: Any | Callable[[], Any],
        *,
        timeout: float,
        name: str = "",
        attempts: int | None = None,
        headers: dict[str, str] | None = None,
        heard: Heard | None = None,
    ) -> dict[str, Any]:
        """The JSON object that answers ``body``, or what ``body()`` makes for each attempt; ``name`` is what errors call the request.
        ``heard`` is told of every object of an answer that comes as server-sent events, of which the last one counts; an answer that is
        cut off begins anew. Raises BackendError.
        """
        return await self._often("POST", path, body, timeout, name or path, attempts, headers, heard)

    async def _often(
        self,
        method: str,
        path: str,
        body: Any,
        timeout: float,
        name: str,
        attempts: int | None = None,
        headers: dict[str, str] | None = None,
        heard: Heard | None = None,
    ) -> dict[str, Any]:
        deadline, attempts, cuts = time.monotonic() + timeout, attempts or self._attempts, 0
        for attempt in range(attempts):
            try:
                async with self._places if path in self._bounded else nullcontext():
                    sent = self._sent(method, path, body() if callable(body) else body, headers, heard)
                    return await self._once(sent, deadline - time.monotonic(), name)
            except BackendUnavailable as error:
                cuts += isinstance(error, _CutOff)
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.5)
                if attempt + 1 == attempts or cuts == CUTS or time.monotonic() + wait >= deadline:
                    raise BackendUnavailable(f"{error}; tried {attempt + 1} times") from error
                self.retried += 1
                await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _once(self, sent: Coroutine[Any, Any, tuple[int, str]], timeout: float, name: str) -> dict[str, Any]:
        import aiohttp

        try:
            status, text = await asyncio.wait_for(sent, max(timeout, 0.001))
        except TimeoutError as error:
            raise BackendTimeout(f"the server {self.url} did not answer {name} within its deadline") from error
        except aiohttp.ClientConnectorError as error:
            raise BackendUnavailable(f"the server {self.url} cannot be reached for {name}: {error}".rstrip(": ")) from error
        except aiohttp.ClientError as error:
            raise _CutOff(f"the server {self.url} cut off {name}: {type(error).__name__} {error}".rstrip()) from error
        if status in PASSING:
            raise BackendUnavailable(f"the server {self.url} answered {name} with {status}: {text[:300]!r}")
        if status >= 500:
            raise BackendError(f"the server {self.url} failed on {name} with {status}: {text[:300]!r}")
        if status >= 400:
            raise RequestRefused(f"the server {self.url} refused {name} with {status}: {text[:300]!r}")
        try:
            found = json.loads(text) if text else {}
        except ValueError as error:
            raise BackendError(f"expected JSON from {self.url} for {name}, got {text[:100]!r}") from error
        if not isinstance(found, dict):
            raise BackendError(f"expected a JSON object from {self.url} for {name}, got {type(found).__name__} {text[:100]!r}")
        return found

    async def _sent(self, method: str, path: str, body: Any, headers: dict[str, str] | None, heard: Heard | None) -> tuple[int, str]:
        """Status and text; of server-sent events, the last one."""
        async with self._client.request(method, self.url + path, json=body, headers=headers) as answer:
            if heard is None or answer.status != 200:
                return answer.status, await answer.text(errors="replace")
            last, rest = "", b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        last = line.removeprefix(b"data: ").decode()
                        heard(json.loads(last))
            return 200, last

    async def aclose(self) -> None:
        await self._client.close()
