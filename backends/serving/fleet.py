"""Several servers of one model as one: who is asked, what each was given to play with, and what happens when one loses it.

One episode is always asked of the same server (``Prompt.affinity``), so that its prefix stays in that server's cache. An endpoint may be
SGLang's own router: generations go to it, with the episode as routing key; weights, adapters and aborts go to every server behind it,
never through it. The router (0.3.2) leaves out what it does not know, so behind it truncated samplings have no log-probs and are an error.

After ``load`` has returned, an answer of any other version is thrown away and asked for again; a server that restarted is given its weights
back first. A swap by somebody else is told apart: an episode that began under other weights fails with both versions named, the next ones
play on with the new.

    swap="wait"       our new requests wait until those under way have ended, then the weights change: one version a generation
    swap="midway"     requests under way are held, their cache is dropped, and they go on with the new weights: versions by token

Either way the server is paused while it changes. Asked for other weights unpaused, SGLang 0.5.21 waits for its answers to be sent, not for
its scheduler to have tidied up behind them, and where it has not, its own assertion "Cache flush failed after updating weights" kills it.
Requests of others that are under way go on with the new weights.

A LoRA adapter is asked for by name in every request, and its name is its version, since a server that has unloaded a name loads it again
from its old place without a word.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from monologue.backends.base import BackendError, BackendUnavailable, RequestRefused
from monologue.backends.serving.answers import versions, whole
from monologue.backends.wire import Heard, Wire

Swap = Literal["wait", "midway"]
ROUTING_KEY = "x-smg-routing-key"
"""Header by which the router (``--policy manual``) keeps an episode with one server."""
ABORT_SECONDS = 5.0
LOAD_SECONDS = 600.0
"""For a server to read a checkpoint, the requests under way included."""
RELOADS = 3
"""How often a server that lost its weights is given them back for one request."""
REMEMBERED = 4096
"""Episodes whose first version is remembered."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights or an adapter that every server was told to take."""

    folder: str
    """Where they lie, for every server."""
    version: str
    """Their name."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered, and as whom."""

    content: dict[str, Any]
    """JSON with ``output_ids`` and ``meta_info``."""
    server: str
    """Address."""
    adapter: str | None
    """Adapter that was asked for."""


class Gate:
    """Lets everybody through until it is closed; who closes it waits until those inside have left. One closes it at a time."""

    def __init__(self) -> None:
        self.inside = 0
        """How many are inside."""
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def through(self) -> AsyncIterator[None]:
        """A place inside, as soon as the gate is open."""
        while not self._open.is_set():
            await self._open.wait()
        self.inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Nobody is inside."""
        self._open.clear()
        try:
            await self._empty.wait()
            yield
        finally:
            self._open.set()


class Fleet:
    """Everything here runs on one event loop."""

    def __init__(self, endpoints: Sequence[str], *, limit: int, attempts: int, timeout: float) -> None:
        self.timeout, self._new = timeout, partial(Wire, limit=limit, attempts=attempts)
        self._fronts = [(wire, [wire]) for wire in map(self._new, endpoints)]
        self.reloads = 0
        """How often a server had to be given its weights back."""
        self._weights: Loaded | None = None
        self._adapter: Loaded | None = None
        self._welcome = set[str]()
        """Versions of full weights that an answer may carry; empty while none were loaded from here."""
        self._began: OrderedDict[str, str] = OrderedDict()
        self._changing = asyncio.Lock()
        self._gate = Gate()

    @property
    def wires(self) -> list[Wire]:
        """Every server, none twice."""
        return list({wire.url: wire for _, behind in self._fronts for wire in behind}.values())

    @property
    def under_way(self) -> int:
        """Requests that were sent and are not answered yet."""
        return self._gate.inside

    @property
    def _named(self) -> str | None:
        """The adapter that requests name."""
        return self._adapter.version if self._adapter else None

    async def facts(self, timeout: float) -> list[dict[str, Any]]:
        """What each server says about itself; those behind a router are found here. Raises BackendError."""
        for front, behind in self._fronts:
            if urls := await _workers(front, timeout):
                behind[:] = map(self._new, urls)
        return [await _facts(wire, timeout) for wire in self.wires]

    async def ask(self, affinity: str, body: dict[str, Any], heard: Heard | None = None) -> Answer:
        """The answer of the episode's own server, carrying the weights that it was given; ``heard`` is told of it as it grows. Raises
        BackendError.
        """
        wire, behind = self._fronts[_share(affinity, len(self._fronts))]
        for _ in range(RELOADS):
            try:
                async with self._gate.through():
                    adapter, welcome = self._named, self._welcome
                    named = body if adapter is None else {**body, "lora_path": adapter}
                    content = await self._posted(wire, behind, affinity, named, heard)
            except RequestRefused:
                if adapter is None or all([adapter in await _adapters(one, self.timeout) for one in behind]):
                    raise
            else:
                if adapter != self._named:  # an adapter that was dropped meanwhile is loaded again by a request that names it
                    continue
                *before, found = versions(content["meta_info"])
                if not self._welcome or (found in self._welcome and (not welcome or welcome | self._welcome >= set(before))):
                    self._check_steady(affinity, found, wire)
                    return Answer(content, wire.url, adapter)
            for one in behind:
                await self._give_back(one)
        told = self._named or (self._weights.version if self._weights else None)
        raise BackendUnavailable(f"the server {wire.url} keeps losing {told!r}; look into its log")

    async def load(self, loaded: Loaded, swap: Swap) -> None:
        """Full weights to every server; an adapter on the old ones is dropped. Raises BackendError."""
        async with self._changing:
            before = set(self._welcome)
            self._welcome = before | {loaded.version} if before else set()
            try:
                async with self._gate.closed() if swap == "wait" else nullcontext():
                    for wire in self.wires:
                        await _take(wire, loaded)
            except BaseException:
                self._welcome = before
                raise
            self._weights, self._welcome = loaded, {loaded.version}
            await self._turn_to(None)

    async def adapt(self, adapter: Loaded) -> None:
        """An adapter to every server, asked for from now on; the one before it is dropped. Raises BackendError."""
        async with self._changing:
            for wire in self.wires:
                await _attach(wire, adapter)
            await self._turn_to(adapter)

    async def _turn_to(self, adapter: Loaded | None) -> None:
        """Requests name this adapter from now on; the one before it goes once the requests that named it have ended."""
        before, self._adapter = self._adapter, adapter
        if before is not None:
            for wire in self.wires:
                await wire.post("/unload_lora_adapter", {"lora_name": before.version}, timeout=LOAD_SECONDS)

    async def healthy(self, timeout: float) -> bool:
        """Whether every server answers a generation now."""
        try:
            for wire in self.wires:
                await wire.get("/health_generate", timeout=timeout)
        except BackendError:
            return False
        return True

    async def aclose(self) -> None:
        for wire in {*self.wires, *(front for front, _ in self._fronts)}:
            await wire.aclose()

    async def _posted(self, wire: Wire, behind: Sequence[Wire], affinity: str, body: dict[str, Any], heard: Heard | None) -> dict[str, Any]:
        """A fresh rid for every attempt: aborts match by prefix, and a request that was lost may still run."""
        rids = list[str]()

        def named() -> dict[str, Any]:
            rids.append(uuid.uuid4().hex)
            return {**body, "rid": rids[-1], **({"stream": True} if heard else {})}

        name = f"a generation for {len(body['input_ids'])} ids"
        try:
            key = {ROUTING_KEY: affinity}
            answer = await wire.post("/generate", named, timeout=self.timeout, name=name, headers=key, heard=heard)
        except (asyncio.CancelledError, BackendError):
            await asyncio.shield(asyncio.gather(*(_aborted(one, rids) for one in behind)))
            raise
        return whole(answer, wire.url, rids[-1])

    def _check_steady(self, affinity: str, found: str, wire: Wire) -> None:
        """An episode that began under other weights than ours or its first ones fails; the mark it leaves is that of the new ones."""
        if self._welcome:
            return
        before = self._began.get(affinity, found)
        self._began[affinity] = found
        if len(self._began) > REMEMBERED:
            self._began.popitem(last=False)
        if before != found:
            raise BackendError(
                f"somebody gave the server {wire.url} other weights in the middle of an episode: it began with {before!r}, now they are "
                f"{found!r}; play it anew, or load weights through this client, which then holds the server to them"
            )

    async def _give_back(self, wire: Wire) -> None:
        async with self._changing:
            if self._weights and await _version(wire, self.timeout) != self._weights.version:
                self.reloads += 1
                await _take(wire, self._weights)
            if self._adapter and self._adapter.version not in await _adapters(wire, self.timeout):
                self.reloads += 1
                await _attach(wire, self._adapter)


async def _workers(wire: Wire, timeout: float) -> list[str]:
    """Addresses of the servers behind a router; none for a server."""
    try:
        found = (await wire.get("/workers", timeout=timeout)).get("workers", ())
    except RequestRefused:
        return []
    if not found:
        raise BackendUnavailable(f"the router {wire.url} has no servers yet")
    return [str(one["url"]) for one in found]


async def _facts(wire: Wire, timeout: float) -> dict[str, Any]:
    model, server = await wire.get("/model_info", timeout=timeout), await wire.get("/server_info", timeout=timeout)
    length = server.get("max_req_input_len")
    if "model_path" not in model or not isinstance(length, int):
        raise BackendError(f"expected model_path and max_req_input_len from {wire.url}, got {sorted(model)!r} and {sorted(server)!r}")
    told = {key: server.get(key) for key in ("version", "dtype", "device", "enable_lora", "max_lora_rank", "json_model_override_args")}
    return {**model, **told, "context_length": length}


async def _version(wire: Wire, timeout: float) -> object:
    return (await wire.get("/model_info", timeout=timeout)).get("weight_version")


async def _adapters(wire: Wire, timeout: float) -> set[str]:
    """Names of the adapters that a server holds."""
    return {str(one.get("id")) for one in (await wire.get("/v1/models", timeout=timeout)).get("data", ())}


async def _take(wire: Wire, loaded: Loaded) -> None:
    """Full weights to one server, checked by asking it. What it works on is held meanwhile, and begins anew from the ids it has."""
    await wire.post("/pause_generation", {"mode": "retract"}, timeout=LOAD_SECONDS)
    try:
        body = {"model_path": loaded.folder, "weight_version": loaded.version, "flush_cache": True}
        answer = await wire.post("/update_weights_from_disk", body, timeout=LOAD_SECONDS, name=f"weights {loaded.version!r}")
    finally:
        await wire.post("/continue_generation", {}, timeout=LOAD_SECONDS)
    if answer.get("success") is not True:
        raise BackendError(f"the server {wire.url} did not take the weights {loaded.version!r}: {answer.get('message')!r}")
    if (now := await _version(wire, LOAD_SECONDS)) != loaded.version:
        raise BackendError(f"the server {wire.url} took the weights {loaded.version!r} but says that it has {now!r}")


async def _attach(wire: Wire, adapter: Loaded) -> None:
    """An adapter to one server, checked by asking it."""
    body = {"lora_name": adapter.version, "lora_path": adapter.folder}
    answer = await wire.post("/load_lora_adapter", body, timeout=LOAD_SECONDS, name=f"adapter {adapter.version!r}")
    if answer.get("success") is not True:
        raise BackendError(f"the server {wire.url} did not take the adapter {adapter.version!r}: {answer.get('error_message')!r}")
    if adapter.version not in await _adapters(wire, LOAD_SECONDS):
        raise BackendError(f"the server {wire.url} took the adapter {adapter.version!r} but does not list it")


async def _aborted(wire: Wire, rids: Sequence[str]) -> None:
    """Best effort: the server may be gone, which ends the requests too."""
    try:
        for rid in rids:
            await wire.post("/abort_request", {"rid": rid}, timeout=ABORT_SECONDS, name=f"the abort of {rid}", attempts=1)
    except BackendError:
        return


def _share(affinity: str, servers: int) -> int:
    return int.from_bytes(hashlib.sha256(affinity.encode()).digest()[:8], "big") % servers
