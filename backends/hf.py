"""The in-process engine: a Hugging Face model, exact ids, exact log-probs.

Text-only causal models (Llama, Qwen3, ...) and vision-language models of the Qwen-VL kind, from a folder or a Hub name. Calls
are gathered into batches (``batching``), decoded by a loop of our own (``decoding``) rather than by ``model.generate``, because
that one has a single sampling for a batch and cannot let a sequence leave early, and sampled in float64 (``sampling``).

What a caller should know: image and video placeholders are banned from sampling, so log-probs are those of the distribution
without them (``facts.extra["banned_ids"]``; a trainer must ban them too). Without stop ids nothing but ``max_tokens`` ends a
generation. ``threads`` sets torch's thread count for the process; None leaves it alone. A stream that goes on is read from where its
last call ended (``prefixes``; ``prefix_tokens`` bounds what is kept, 0 keeps nothing). With a ``habit`` the model thinks in latent steps
before it speaks (``latent``), and the engine is called ``transformers-latent``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from PIL.Image import Image
from torch import Tensor

from monologue.backends.base import LATENT, BackendError, Facts, Generation, ImageFacts, Prompt, RequestRefused, Sampling
from monologue.backends.batching import Batcher, Ticket
from monologue.backends.checkpoints import Checkpoint, open_checkpoint, take_weights
from monologue.backends.decoding import Decoder, Lane
from monologue.backends.inputs import Inputs
from monologue.backends.latent import Habit, Thinker
from monologue.backends.pictures import Placeholders, locate
from monologue.backends.prefixes import Prefixes
from monologue.backends.tokens import template_hash, tokenizer_hash


@dataclass(frozen=True, slots=True)
class _Generate:
    prompt: Prompt
    sampling: Sampling
    images: tuple[ImageFacts, ...]
    seed: int
    started: float


@dataclass(frozen=True, slots=True)
class _Score:
    prompt: Prompt
    ids: tuple[int, ...]
    sampling: Sampling
    images: tuple[ImageFacts, ...]


@dataclass(frozen=True, slots=True)
class _Load:
    weights: str
    version: str


_Job: TypeAlias = "_Generate | _Score | _Load"
_Tickets: TypeAlias = "list[Ticket[Any, Any]]"


class _Shown:
    """The pictures of one batch, prepared once however many requests show them: the same pixels give the same tensor."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Patches of all pictures, one after another (N, values)."""
        plain = [image.convert("RGB") for image in images]
        key = tuple((image.size, image.tobytes()) for image in plain)
        if key not in self._known:
            self._known[key] = self._inputs.pixels(plain)[0]
        return self._known[key]


class HFBackend:
    """Runs one model. ``source`` is a folder, a Hub name, ``starter:NAME``, or a checkpoint that is open already; ``version`` names its
    weights (default: by content).
    """

    def __init__(
        self,
        source: str | Path | Checkpoint,
        *,
        version: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int | None = 1,
        max_batch: int = 64,
        max_batch_tokens: int = 65536,
        window: float = 0.001,
        timeout: float | None = None,
        local_files_only: bool = False,
        prefix_tokens: int = 32768,
        habit: Habit | None = None,
    ) -> None:
        if not isinstance(source, Checkpoint):
            if dtype not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"dtype must be 'float32', 'bfloat16' or 'float16', got {dtype!r}")
            numbers = getattr(torch, dtype)
            source = open_checkpoint(str(source), device=device, dtype=numbers, local_files_only=local_files_only)
        self._model, self._inputs = source.model, Inputs(source)
        self.tokenizer = source.tokenizer
        self.processor_hash, self.image_token_id = self._inputs.processor_hash, self._inputs.image_token_id
        self._prefixes, self._threads = Prefixes(0 if habit else prefix_tokens), threads
        self._habit, self._decoder = habit, self._decoding(habit)
        self._thoughts = habit.places if habit else 0
        self._facts = self._describe(source.source, version or source.version)
        self._batcher: Batcher[_Job, Any] = Batcher(
            self._run,
            name=f"the transformers engine of {source.source!r}",
            max_batch=max_batch,
            max_tokens=max_batch_tokens,
            window=window,
            timeout=timeout,
        )

    @property
    def facts(self) -> Facts:
        return self._facts

    def placeholders(self, image: Image) -> Placeholders:
        """The room a picture takes in a prompt; it depends on the picture's size alone."""
        return self._inputs.placeholders(image)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        started = time.perf_counter()
        images = self._admit(prompt, 1, sampling)
        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        size = len(prompt.ids) + self._thoughts + self._limit(prompt, sampling)
        generation: Generation = await self._batcher.submit(_Generate(prompt, sampling, images, seed, started), size)
        return generation

    async def score(self, prompt: Prompt, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
        images = self._admit(prompt, len(ids), sampling)
        if strange := [token for token in ids if not 0 <= token < self._inputs.vocabulary or token in self._inputs.banned]:
            raise RequestRefused(f"expected ids that this model can sample, got {strange[0]!r}")
        if not ids:
            return ()
        found: tuple[float, ...] = await self._batcher.submit(
            _Score(prompt, ids, sampling, images), len(prompt.ids) + self._thoughts + len(ids)
        )
        return found

    async def load(self, weights: str, version: str) -> None:
        """Full weights of the same model from a folder. Calls before it see the old weights, calls after it the new ones."""
        await self._batcher.submit(_Load(weights, version), timeless=True)

    async def aclose(self) -> None:
        await self._batcher.aclose()

    def _decoding(self, habit: Habit | None) -> Decoder | Thinker:
        if habit is None:
            return Decoder(self._model, self._inputs.banned, self._prefixes)
        return Thinker(self._model, self._inputs.banned, habit, self.tokenizer)

    def _describe(self, model: str, version: str) -> Facts:
        text = self._model.config.get_text_config()
        return Facts(
            model=model,
            engine=LATENT if self._habit else "transformers",
            engine_version=transformers.__version__,
            weights_version=version,
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            template_hash=template_hash(self.tokenizer.chat_template),
            sees=self._inputs.sees,
            context_length=int(text.max_position_embeddings),
            extra={
                "architecture": type(self._model).__name__,
                "banned_ids": list(self._inputs.banned),
                "device": str(self._model.device),
                "dtype": str(self._model.dtype).removeprefix("torch."),
                "image_token_id": self.image_token_id,
                "processor_hash": self.processor_hash,
                "torch": torch.__version__,
                "vocabulary": self._inputs.vocabulary,
                **({"habit": self._habit.told()} if self._habit else {}),
            },
        )

    def _admit(self, prompt: Prompt, room: int, sampling: Sampling) -> tuple[ImageFacts, ...]:
        """Refuses what can never succeed; says where the pictures sit."""
        if not prompt.ids:
            raise RequestRefused("expected at least one prompt id, got none")
        if len(prompt.ids) + self._thoughts + room > self._facts.context_length:
            told = f"{len(prompt.ids)} + {room}" + (f" and {self._thoughts} for thoughts" if self._thoughts else "")
            raise RequestRefused(f"expected prompt and reply within {self._facts.context_length} tokens, got {told}")
        if strange := [token for token in (*prompt.ids, *sampling.stop_ids) if not 0 <= token < self._inputs.vocabulary]:
            raise RequestRefused(f"expected ids from 0 to {self._inputs.vocabulary - 1}, got {strange[0]!r}")
        if unseen := [token for token in prompt.ids if token in self._inputs.banned and token != self.image_token_id]:
            raise RequestRefused(f"expected no video placeholder, got id {unseen[0]!r}: this engine takes pictures only")
        rooms = tuple(self.placeholders(picture.image) for picture in prompt.pictures)
        images = locate(prompt, rooms, self.image_token_id, self.processor_hash) if self._inputs.sees else ()
        if self._habit is not None:
            self._habit.admit(images)
        return images

    def _limit(self, prompt: Prompt, sampling: Sampling) -> int:
        return min(sampling.max_tokens, self._facts.context_length - len(prompt.ids) - self._thoughts)

    def _run(self, tickets: _Tickets) -> None:
        """One batch, in the worker's thread; all its jobs are of one type."""
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        {_Generate: self._run_generate, _Score: self._run_score, _Load: self._run_load}[type(tickets[0].job)](tickets)

    def _run_generate(self, tickets: _Tickets) -> None:
        owners = {lane: ticket for ticket, lane in self._lanes(tickets)}
        if not owners:
            return
        for lane, ticket in owners.items():
            lane.dice.seed(ticket.job.seed)
        for lane in self._decoder.generate(list(owners), lambda lane: owners[lane].dropped):
            ticket = owners[lane]
            ticket.resolve(
                Generation(
                    ids=tuple(lane.sampled),
                    logprobs=tuple(lane.logprobs),
                    finish_reason="stop" if lane.stopped else "length",
                    weights_version=self._facts.weights_version,
                    images=ticket.job.images,
                    seconds=time.perf_counter() - ticket.job.started,
                    seed=ticket.job.seed,
                    cached_tokens=lane.cached,
                    entropies=tuple(lane.entropies),
                    thoughts=lane.thoughts,
                )
            )

    def _run_score(self, tickets: _Tickets) -> None:
        if lanes := self._lanes(tickets):
            scores = self._decoder.score([lane for _, lane in lanes], [len(ticket.job.ids) for ticket, _ in lanes])
            for (ticket, _), score in zip(lanes, scores, strict=True):
                ticket.resolve(score)

    def _run_load(self, tickets: _Tickets) -> None:
        for ticket in tickets:
            try:
                take_weights(self._model, ticket.job.weights)
            except BackendError as error:
                ticket.fail(error)
                continue
            self._facts = replace(self._facts, weights_version=ticket.job.version)
            self._prefixes.clear()
            ticket.resolve(None)

    def _lanes(self, tickets: _Tickets) -> list[tuple[Ticket[Any, Any], Lane]]:
        """Tickets with what the model is fed; a request whose pictures cannot be prepared fails alone."""
        ready, shown = [], _Shown(self._inputs)
        for ticket in tickets:
            try:
                ready.append((ticket, self._lane(ticket.job, shown)))
            except (BackendError, ValueError, OSError) as error:
                refusal = RequestRefused(f"the pictures of this request cannot be prepared: {error}")
                refusal.__cause__ = error
                ticket.fail(refusal)
        return ready

    def _lane(self, job: _Generate | _Score, shown: _Shown) -> Lane:
        """A scored lane is read whole; one that is to go on takes up what its stream has read."""
        prompt, images = job.prompt, job.images
        ids = (*prompt.ids, *(job.ids if isinstance(job, _Score) else ()))
        names = tuple(picture.sha256 for picture in prompt.pictures)
        stream = prompt.affinity if isinstance(job, _Generate) else ""
        read = self._prefixes.find(stream, ids, names) if stream else None
        grids = torch.tensor([image.grid for image in images]) if images else None
        pixels = shown.pixels([picture.image for picture in prompt.pictures]) if images and read is None else None
        limit = self._limit(prompt, job.sampling)
        fresh = grids if read is None else None
        more: dict[str, Any] = {"affinity": stream, "pictures": names, "read": read, "chosen": prompt.chosen}
        return Lane(ids, self._inputs.positions(ids, grids), pixels, fresh, job.sampling, limit, **more)
