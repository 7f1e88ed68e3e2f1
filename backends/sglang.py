"""Client of real SGLang servers: token ids in, token ids and log-probs out, over the native ``/generate``.

The server is fast and unforgiving: an id outside the vocabulary kills it, expanded placeholders beside a raw picture hang the request for
ever, a picture too many is dropped without a word. So everything is counted here before it is sent, and counted again when the answer is
there: the server's number of prompt tokens must be ours, else it tokenised anew and the trace would lie.

What the server is told, and why:

    one placeholder a picture     it expands them itself; the expanded ids stay in the trace and go to the trainer
    logit bias on placeholders    they are never sampled, here as in process (``facts.extra["banned_ids"]``)
    the sampling mask             with top-p or top-k its plain log-probs are those before truncation; the mask gives the truncated ones
    a fresh rid per attempt       aborts match by prefix, and a request that was lost may still run
    no seed                       it only honours one in deterministic mode; else none is recorded

Log-probs at temperature T are of the tempered distribution, as everywhere. Several endpoints are served in turn, one episode always by
the same (``Prompt.affinity``), so that its prefix stays in that server's cache. A server that restarted carries other weights than it was
given: its generation is thrown away, it is given its weights again, and only then asked once more.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image

from monologue.backends.base import (
    BackendError,
    BackendUnavailable,
    Facts,
    FinishReason,
    Generation,
    ImageFacts,
    Prompt,
    RequestRefused,
    Sampling,
)
from monologue.backends.checkpoints import open_config, open_processors
from monologue.backends.inputs import Eyes
from monologue.backends.pictures import Placeholders, locate
from monologue.backends.places import UNKNOWN, portable
from monologue.backends.tokens import template_hash, tokenizer_hash
from monologue.backends.wire import Loop, Wire
from monologue.traces.images import png_bytes

NEVER = -1e9
"""Logit bias of what must not be sampled."""
ABORT_SECONDS = 5.0
LARGEST_MASK = 4096
"""Largest top_k for which the server returns the support that it sampled from."""
RELOADS = 3
"""How often a server that lost its weights is given them back for one request."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights that a server was told to take."""

    weights: str
    """Folder."""
    version: str
    """Name of the version."""


class SGLangBackend:
    """Plays one policy on one or several SGLang servers of the same model."""

    def __init__(
        self,
        *endpoints: str,
        source: str | None = None,
        limit: int = 64,
        timeout: float = 120.0,
        attempts: int = 4,
        connect_timeout: float = 30.0,
    ) -> None:
        """``source`` is where tokenizer and processor lie (default: the model path that the server names); ``limit`` bounds the requests
        in flight per server; ``timeout`` is the deadline of a call in seconds, all retries included.
        """
        if not endpoints:
            raise ValueError("expected at least one endpoint such as http://127.0.0.1:30000, got none")
        self._loop = Loop("sglang client")
        self._timeout, self._loaded = timeout, Loaded("", "")
        try:
            self._wires = self._loop.submit(_wires(endpoints, limit, attempts)).result()
            told = [self._loop.submit(_describe(wire, connect_timeout)).result() for wire in self._wires]
            self.server = told[0]
            self._agree(told)
            name = portable(source or str(self.server["model_path"]))
            config = open_config(name)
            self.tokenizer, processor = open_processors(name, config)
        except BaseException:
            self._loop.stop()
            raise
        self._eyes = Eyes(config, processor, name)
        self.processor_hash, self.image_token_id = self._eyes.processor_hash, self._eyes.image_token_id
        self._vocabulary = int(config.get_text_config().vocab_size)
        self._facts = self._describe(name)
        self._reload = asyncio.Lock()
        self.reloads = 0
        """How often a server had to be given its weights back."""

    @property
    def facts(self) -> Facts:
        return self._facts

    def placeholders(self, image: Image) -> Placeholders:
        """The room a picture takes in a prompt."""
        return self._eyes.placeholders(image)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        started = time.perf_counter()
        images = self._admit(prompt, 1, sampling)
        limit = min(sampling.max_tokens, self._facts.context_length - len(prompt.ids))
        body = {**self._ids_and_pictures(prompt, images), "sampling_params": self._parameters(sampling, limit), "return_logprob": True}
        if _truncated(sampling):
            body["return_sampling_mask"] = True
            body["sampling_params"]["top_k"] = self._mask_size(sampling)
        answer = await self._loop.run(self._asked(prompt, body))
        generation = self._read(answer, prompt, sampling)
        return replace(generation, images=images, seconds=time.perf_counter() - started)

    async def score(self, prompt: Prompt, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
        """Of the untempered, untruncated distribution alone; other samplings are refused, since the server cannot score them."""
        images = self._admit(prompt, len(ids), sampling)
        if (sampling.temperature not in (0.0, 1.0)) or _truncated(sampling):
            raise RequestRefused(f"the server scores at temperature 1 without truncation, not with {sampling!r}; replay in process instead")
        if strange := [token for token in ids if not 0 <= token < self._vocabulary or token in self._eyes.banned]:
            raise RequestRefused(f"expected ids that this model can sample, got {strange[0]!r}")
        if not ids:
            return ()
        whole = replace(prompt, ids=prompt.ids + ids)
        body = {
            **self._ids_and_pictures(whole, images),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._loop.run(self._asked(whole, body))
        rows = answer["meta_info"]["input_token_logprobs"][-len(ids) :]
        if [row[1] for row in rows] != list(ids):
            raise BackendError(f"the server scored other ids than it was sent: {[row[1] for row in rows][:5]} for {list(ids)[:5]}")
        return tuple(float(row[0]) for row in rows)

    async def load(self, weights: str, version: str) -> None:
        """Full weights from a folder that every server can read. Calls after it carry ``version``; raises BackendError where one fails."""
        await self._loop.run(self._load_everywhere(Loaded(weights, version)))

    async def warm(self) -> None:
        """One token from every server, so that the first episode does not pay for what is made at first use."""
        body = {"input_ids": [self._vocabulary // 2], "sampling_params": {"max_new_tokens": 1}}
        for wire in self._wires:
            await self._loop.run(wire.post("/generate", body, timeout=self._timeout, name="a warm-up"))

    async def healthy(self) -> bool:
        """Whether every server answers a generation now."""
        try:
            for wire in self._wires:
                await self._loop.run(wire.get("/health_generate", timeout=10.0))
        except BackendError:
            return False
        return True

    async def aclose(self) -> None:
        for wire in self._wires:
            await self._loop.run(wire.aclose())
        self._loop.stop()

    # What is sent.

    def _admit(self, prompt: Prompt, room: int, sampling: Sampling) -> tuple[ImageFacts, ...]:
        """Refuses what would kill or hang the server, or be dropped in silence."""
        if not prompt.ids:
            raise RequestRefused("expected at least one prompt id, got none")
        if len(prompt.ids) + room > self._facts.context_length:
            raise RequestRefused(f"expected prompt and reply within {self._facts.context_length} tokens, got {len(prompt.ids)} + {room}")
        if strange := [token for token in (*prompt.ids, *sampling.stop_ids) if not 0 <= token < self._vocabulary]:
            raise RequestRefused(f"expected ids from 0 to {self._vocabulary - 1}, got {strange[0]!r}")
        if unseen := [token for token in prompt.ids if token in self._eyes.banned and token != self.image_token_id]:
            raise RequestRefused(f"expected no video placeholder, got id {unseen[0]!r}: this engine takes pictures only")
        rooms = tuple(self.placeholders(picture.image) for picture in prompt.pictures)
        return locate(prompt, rooms, self.image_token_id, self.processor_hash) if self._eyes.sees else ()

    def _ids_and_pictures(self, prompt: Prompt, images: Sequence[ImageFacts]) -> dict[str, Any]:
        ids, last = list[int](), 0
        for image in images:
            ids += prompt.ids[last : image.placeholder_start + 1]
            last = image.placeholder_start + image.placeholder_count
        ids += prompt.ids[last:]
        pictures = [base64.b64encode(png_bytes(picture.image)).decode() for picture in prompt.pictures]
        return {"input_ids": ids, **({"image_data": pictures} if pictures else {})}

    def _parameters(self, sampling: Sampling, limit: int) -> dict[str, Any]:
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_new_tokens": limit,
            "stop_token_ids": list(sampling.stop_ids),
            "skip_special_tokens": False,
            **({"logit_bias": {str(token): NEVER for token in self._eyes.banned}} if self._eyes.banned else {}),
        }

    def _mask_size(self, sampling: Sampling) -> int:
        """The top_k with which the server tells the truncated distribution: it does so for finite ones only. Raises RequestRefused."""
        top_k = sampling.top_k or self._vocabulary
        if top_k > LARGEST_MASK:
            raise RequestRefused(
                f"the server gives log-probs of a truncated distribution for top_k up to {LARGEST_MASK} only, got {sampling!r}; "
                f"set top_k={LARGEST_MASK} or lower, or sample without truncation"
            )
        return top_k

    # How it is sent.

    async def _asked(self, prompt: Prompt, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of the episode's own server, carrying the weights that it was given."""
        wire = self._wires[_share(prompt.affinity, len(self._wires))]
        for _ in range(RELOADS):
            answer = await self._posted(wire, body)
            found = _version(answer["meta_info"].get("weight_version"))
            if not self._loaded.version or found == self._loaded.version:
                return answer
            await self._give_back(wire)
        raise BackendUnavailable(f"the server {wire.url} keeps losing the weights {self._loaded.version!r}; look into its log")

    async def _posted(self, wire: Wire, body: dict[str, Any]) -> dict[str, Any]:
        rid = uuid.uuid4().hex
        try:
            answer = await wire.post("/generate", {**body, "rid": rid}, timeout=self._timeout, name=f"request {rid}")
        except (asyncio.CancelledError, BackendError):
            await asyncio.shield(_aborted(wire, rid))
            raise
        meta = answer.get("meta_info")
        if not isinstance(meta, dict) or not isinstance(answer.get("output_ids"), list):
            raise BackendError(f"expected output_ids and meta_info from {wire.url} for request {rid}, got keys {sorted(answer)!r}")
        return answer

    async def _give_back(self, wire: Wire) -> None:
        async with self._reload:
            now = (await wire.get("/model_info", timeout=self._timeout)).get("weight_version")
            if now != self._loaded.version:
                self.reloads += 1
                await _take(wire, self._loaded, self._timeout)

    async def _load_everywhere(self, loaded: Loaded) -> None:
        async with self._reload:
            for wire in self._wires:
                await _take(wire, loaded, self._timeout)
            self._loaded = loaded
            self._facts = replace(self._facts, weights_version=loaded.version)

    # What comes back.

    def _read(self, answer: dict[str, Any], prompt: Prompt, sampling: Sampling) -> Generation:
        meta, ids = answer["meta_info"], tuple(int(token) for token in answer["output_ids"])
        if meta.get("prompt_tokens") != len(prompt.ids):
            raise BackendError(
                f"the prompt has {len(prompt.ids)} ids with its pictures expanded, but the server counted {meta.get('prompt_tokens')!r}: "
                "it prepares pictures otherwise or tokenised anew; give both sides the same processor settings"
            )
        if forbidden := [token for token in ids if token in self._eyes.banned]:
            raise BackendError(f"the server sampled the placeholder {forbidden[0]}, which it was told not to")
        logprobs = _logprobs(meta, ids, _truncated(sampling))
        return Generation(
            ids=ids,
            logprobs=logprobs,
            finish_reason=_finish(meta, ids, sampling),
            weights_version=_version(meta.get("weight_version")),
            cached_tokens=meta.get("cached_tokens"),
            weights=_weights(meta),
        )

    def _agree(self, told: Sequence[dict[str, Any]]) -> None:
        models = {str(one["model_path"]) for one in told}
        if len(models) > 1:
            raise BackendError(f"expected servers of one model, got {sorted(models)!r}")

    def _describe(self, name: str) -> Facts:
        server = self.server
        return Facts(
            model=name,
            engine="sglang",
            engine_version=str(server.get("version", "unknown")),
            weights_version=_version(server.get("weight_version")),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            template_hash=template_hash(self.tokenizer.chat_template),
            sees=self._eyes.sees,
            context_length=int(server["context_length"]),
            extra={
                "banned_ids": list(self._eyes.banned),
                "endpoints": [wire.url for wire in self._wires],
                "image_token_id": self.image_token_id,
                "processor_hash": self.processor_hash,
                "dtype": server.get("dtype"),
                "vocabulary": self._vocabulary,
            },
        )


async def _wires(endpoints: Sequence[str], limit: int, attempts: int) -> list[Wire]:
    return [Wire(endpoint, limit=limit, attempts=attempts) for endpoint in endpoints]


async def _describe(wire: Wire, timeout: float) -> dict[str, Any]:
    """Facts of a server. Raises BackendError."""
    model, server = await wire.get("/model_info", timeout=timeout), await wire.get("/server_info", timeout=timeout)
    length = server.get("max_req_input_len")
    if "model_path" not in model or not isinstance(length, int):
        raise BackendError(f"expected model_path and max_req_input_len from {wire.url}, got {sorted(model)!r} and {sorted(server)!r}")
    return {**model, "context_length": length, "version": server.get("version"), "dtype": server.get("dtype")}


async def _take(wire: Wire, loaded: Loaded, timeout: float) -> None:
    body = {"model_path": loaded.weights, "weight_version": loaded.version, "flush_cache": True}
    answer = await wire.post("/update_weights_from_disk", body, timeout=timeout, name=f"weights {loaded.version!r}")
    if answer.get("success") is not True:
        raise BackendError(f"the server {wire.url} did not take the weights {loaded.version!r}: {answer.get('message')!r}")
    now = (await wire.get("/model_info", timeout=timeout)).get("weight_version")
    if now != loaded.version:
        raise BackendError(f"the server {wire.url} took the weights {loaded.version!r} but says that it has {now!r}")


async def _aborted(wire: Wire, rid: str) -> None:
    """Best effort: the server may be gone, which ends the request too."""
    try:
        await wire.post("/abort_request", {"rid": rid}, timeout=ABORT_SECONDS, name=f"the abort of {rid}", attempts=1)
    except BackendError:
        return


def _share(affinity: str, servers: int) -> int:
    return int.from_bytes(hashlib.sha256(affinity.encode()).digest()[:8], "big") % servers


def _truncated(sampling: Sampling) -> bool:
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)


def _logprobs(meta: dict[str, Any], ids: tuple[int, ...], truncated: bool) -> tuple[float, ...]:
    rows = meta.get("output_token_logprobs") or []
    if [row[1] for row in rows] != list(ids):
        raise BackendError(f"the server sent log-probs for other ids than it sampled: {[row[1] for row in rows][:5]} for {list(ids)[:5]}")
    if not truncated:
        return tuple(float(row[0]) for row in rows)
    values = meta.get("output_token_sampling_logprobs")
    if values is None or len(values) != len(ids):
        raise BackendError("the server sent no log-probs of the truncated distribution; sample with top_p=1 and top_k=0 on this version")
    return tuple(min(0.0, float(value)) for value in values)


def _version(name: object) -> str:
    """The server's name for the weights that it was started with is ``default``; ours is ``base``."""
    return UNKNOWN if name in (None, "default") else str(name)


def _weights(meta: dict[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """Versions and the ids that each sampled; empty where one sampled all."""
    found = tuple((_version(one["version"]), int(one["start"]), int(one["end"])) for one in meta.get("weight_versions") or ())
    return found if len(found) > 1 else ()


def _finish(meta: dict[str, Any], ids: tuple[int, ...], sampling: Sampling) -> FinishReason:
    kind = (meta.get("finish_reason") or {}).get("type")
    if kind == "abort":
        raise BackendUnavailable(f"the server aborted the request after {len(ids)} tokens: {meta['finish_reason'].get('message')!r}")
    return "stop" if kind == "stop" or (ids and ids[-1] in sampling.stop_ids) else "length"
