"""Client of real SGLang servers: token ids in, token ids and log-probs out, over the native ``/generate``.

The server is fast and unforgiving, so everything is counted before it is sent (``serving/requests.py``) and counted again when the
answer is there (``serving/answers.py``). Which server is asked, what it was loaded with, restarts and swaps are the business of
``serving/fleet.py``; deadlines, retries and errors that of ``wire.py``. A server that takes latent steps (``serving/latent.py``) says so
itself; its thoughts are taken out of the reply and told beside it. Log-probs at temperature T are of the tempered, truncated distribution
that was really sampled, as everywhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from monologue.backends.base import BackendError, Facts, Generation, Prompt, RequestRefused, Sampling
from monologue.backends.checkpoints import open_config, open_processors
from monologue.backends.inputs import Eyes
from monologue.backends.pictures import Placeholders
from monologue.backends.places import place, portable
from monologue.backends.serving.answers import read_generation, read_scores, truncated, version
from monologue.backends.serving.fleet import Fleet, Loaded, Swap
from monologue.backends.serving.latent import Thinking
from monologue.backends.serving.requests import Requests
from monologue.backends.tokens import template_hash, tokenizer_hash
from monologue.backends.wire import Loop


class SGLangBackend:
    """Plays one policy on one or several SGLang servers of the same model."""

    def __init__(
        self,
        *endpoints: str,
        source: str | None = None,
        limit: int = 64,
        timeout: float = 120.0,
        attempts: int = 30,
        connect_timeout: float = 30.0,
    ) -> None:
        """``source`` is where tokenizer and processor lie (default: the model path that the server names); ``limit`` bounds the requests
        in flight per server; ``timeout`` is the deadline of a call in seconds, all retries included.
        """
        if not endpoints:
            raise ValueError("expected at least one endpoint such as http://127.0.0.1:30000, got none")
        self._loop = Loop("sglang client")
        self.fleet = self._loop.submit(_fleet(endpoints, limit, attempts, timeout)).result()
        try:
            told = self._loop.submit(self.fleet.facts(connect_timeout)).result()
            self.server = told[0]
            _check_alike(told)
            name = portable(source or str(self.server["model_path"]))
            config = open_config(name)
            self.tokenizer, processor = open_processors(name, config)
            self.thinking = Thinking.told(self.server)
            habit = self._habit(name, config)
        except BaseException:
            self._loop.submit(self.fleet.aclose()).result()
            self._loop.stop()
            raise
        self._eyes = Eyes(config, processor, name)
        self.processor_hash, self.image_token_id = self._eyes.processor_hash, self._eyes.image_token_id
        vocabulary, length = int(config.get_text_config().vocab_size), int(self.server["context_length"])
        self._requests = Requests(self._eyes, self.tokenizer, vocabulary, length, own_limits=config.model_type == "qwen2_vl")
        self._facts = self._describe(name, habit)

    @property
    def facts(self) -> Facts:
        return self._facts

    def placeholders(self, image: Image) -> Placeholders:
        """The room a picture takes in a prompt."""
        return self._eyes.placeholders(image)

    async def generate(self, prompt: Prompt, sampling: Sampling, *, heard: Callable[[tuple[int, ...]], None] | None = None) -> Generation:
        """Samples. ``heard`` is told the ids so far, in the caller's loop, whenever there are more; where an answer was lost and is asked
        for again, they begin anew.
        """
        started, thoughts = time.perf_counter(), self.thinking.places if self.thinking else 0
        if prompt.chosen is not None:
            raise RequestRefused("a server chooses patches by itself; give chosen ones to score, or think in process")
        images = self._requests.admit(prompt, 1 + thoughts, sampling)
        if self.thinking:
            self.thinking.admit(prompt, images)
        body, here = self._requests.generation(prompt, images, sampling, thoughts), asyncio.get_running_loop()

        def told(part: dict[str, Any]) -> None:
            ids = tuple(token for token in part.get("output_ids") or () if self.thinking is None or token < self.thinking.id)
            ids = ids[: sampling.max_tokens]
            if heard and ids:
                here.call_soon_threadsafe(heard, ids)

        answer = await self._loop.run(self.fleet.ask(prompt.affinity, body, told if heard else None))
        found = read_generation(answer.content, prompt.ids, sampling, self._eyes.banned)
        if self.thinking:
            found = self.thinking.apart(found, sampling)
        weights = answer.adapter or found.weights_version
        seconds = time.perf_counter() - started
        return replace(found, images=images, server=answer.server, weights_version=weights, seconds=seconds)

    async def score(self, prompt: Prompt, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
        """Of the untempered, untruncated distribution alone; other samplings are refused, since the server cannot score them."""
        images = self._requests.admit(prompt, len(ids) + (self.thinking.places if self.thinking else 0), sampling)
        thoughts = self.thinking.again(prompt, images) if self.thinking else ()
        prompt = replace(prompt, ids=prompt.ids + thoughts)
        if (sampling.temperature not in (0.0, 1.0)) or truncated(sampling):
            raise RequestRefused(f"the server scores at temperature 1 without truncation, not with {sampling!r}; replay in process instead")
        body = self._requests.scores(prompt, ids, images)
        if not ids:
            return ()
        answer = await self._loop.run(self.fleet.ask(prompt.affinity, body))
        return read_scores(answer.content, prompt.ids, ids, self._eyes.banned)

    async def load(self, weights: str, version: str, *, swap: Swap = "wait") -> None:
        """Full weights, or a LoRA adapter, from a folder that every server can read. Calls after it carry ``version``.

        With ``swap="midway"`` requests under way go on with the new weights, and say which sampled which token. Raises BackendError where
        a server does not take them, or was not started for adapters.
        """
        loaded = Loaded(str(weights), version)
        if (Path(weights) / "adapter_config.json").is_file():
            if not self.server.get("enable_lora"):
                raise BackendError(
                    f"expected servers that take LoRA adapters for {str(weights)!r}, but {self.fleet.wires[0].url} was started without "
                    "--enable-lora; start it with 'monologue serve --lora-rank N', or load merged weights"
                )
            await self._loop.run(self.fleet.adapt(loaded))
        else:
            await self._loop.run(self.fleet.load(loaded, swap))
        self._facts = replace(self._facts, weights_version=version)

    @property
    def reloads(self) -> int:
        """How often a server had to be given its weights back."""
        return self.fleet.reloads

    async def warm(self) -> None:
        """One token from every server, so that the first episode does not pay for what is made at first use."""
        body = {"input_ids": [self._requests.vocabulary // 2], "sampling_params": {"max_new_tokens": 1}}
        for wire in self.fleet.wires:
            await self._loop.run(wire.post("/generate", body, timeout=self.fleet.timeout, name="a warm-up"))

    async def healthy(self, timeout: float = 10.0) -> bool:
        """Whether every server answers a generation within ``timeout`` seconds."""
        return await self._loop.run(self.fleet.healthy(timeout))

    async def aclose(self) -> None:
        await self._loop.run(self.fleet.aclose())
        self._loop.stop()

    def _habit(self, name: str, config: Any) -> str | None:
        """How the checkpoint was taught to think, if the server does. Raises BackendError where it does otherwise."""
        if self.thinking is None:
            return None
        from monologue.backends.latent import Habit

        habit = Habit.load(place(name))
        taught = Thinking.of(habit, config, self.thinking.after, self.thinking.room)
        if taught != self.thinking:
            raise BackendError(f"the server thinks as {self.thinking!r}, but {name!r} was taught to as {taught!r}")
        return habit.told()

    def _describe(self, name: str, habit: str | None) -> Facts:
        server = self.server
        return Facts(
            model=name,
            engine="sglang",
            engine_version=str(server.get("version", "unknown")),
            weights_version=version(server.get("weight_version")),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            template_hash=template_hash(self.tokenizer.chat_template),
            sees=self._eyes.sees,
            context_length=self._requests.context_length,
            extra={
                "banned_ids": list(self._eyes.banned),
                "device": server.get("device"),
                "dtype": server.get("dtype"),
                "endpoints": [wire.url for wire in self.fleet.wires],
                "image_token_id": self.image_token_id,
                "processor_hash": self.processor_hash,
                "vocabulary": self._requests.vocabulary,
                **({"habit": habit} if habit else {}),
            },
        )


async def _fleet(endpoints: Sequence[str], limit: int, attempts: int, timeout: float) -> Fleet:
    return Fleet(endpoints, limit=limit, attempts=attempts, timeout=timeout)


def _check_alike(told: Sequence[dict[str, Any]]) -> None:
    for fact in ("model_path", "json_model_override_args"):
        if len(kinds := {str(one.get(fact)) for one in told}) > 1:
            raise BackendError(f"expected servers of one model, alike in {fact}, got {sorted(kinds)!r}")
