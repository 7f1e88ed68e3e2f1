"""An engine that says what it is told: the main test double, and a way to play a graph without any model.

Replies come from a list (in the order of the calls), a dict (the key that stands latest in the prompt's text answers, so a
dialogue is scripted by the words of its questions), or a function of the request, sync or async. A reply is

    "b2"                       text; encoded, and closed with the first stop id
    (17, 4, 2)                 token ids as they are
    {"b2": 0.7, "a1": 0.3}     a lottery over texts
    BackendTimeout("...")      a failure, raised

Log-probs are exact, not invented: a lottery is a distribution over token sequences, so each token's probability is the share of
the mass that goes through it, tempered and truncated as the sampling says. A single reply is a lottery with one ticket: 0.0
throughout. Torch is not needed. Left out: weights; ``load`` only notes the version.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from PIL.Image import Image

from monologue.backends.base import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    Facts,
    Generation,
    ImageFacts,
    Prompt,
    RequestRefused,
    Sampling,
)
from monologue.backends.pictures import Placeholders, locate
from monologue.backends.tokens import ByteTokenizer, Tokenizer, template_hash, tokenizer_hash

Reply: TypeAlias = "str | tuple[int, ...] | Mapping[str, float] | Exception"
Ticket: TypeAlias = "tuple[tuple[int, ...], float]"


@dataclass(frozen=True, slots=True)
class Request:
    """What a scripted function is given."""

    prompt: Prompt
    """The ids and pictures as they came."""
    text: str
    """The ids decoded, special tokens included."""
    sampling: Sampling
    """How the caller wants tokens drawn."""
    index: int
    """Number of generate calls before this one; -1 when scoring."""


Script: TypeAlias = "Sequence[Reply] | Mapping[str, Reply] | Callable[[Request], Reply | Awaitable[Reply]]"


class ScriptedBackend:
    """Says ``replies``. ``requests`` holds the last 1024 calls, for tests to look at."""

    def __init__(
        self,
        replies: Script,
        tokenizer: Tokenizer | None = None,
        *,
        delay: float = 0.0,
        timeout: float | None = None,
        model: str = "scripted",
        sees: bool = True,
        context_length: int = 1 << 20,
        grid: tuple[int, int, int] = (1, 6, 6),
        merge: int = 2,
        placeholder: str = "<|image_pad|>",
        weights_version: str = "0",
    ) -> None:
        self.tokenizer: Tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self.requests: deque[Request] = deque(maxlen=1024)
        self.processor_hash = template_hash(f"scripted {grid} {merge}")
        self.chat_template = getattr(self.tokenizer, "chat_template", None)
        self._replies, self._delay, self._timeout, self._calls, self._closed = replies, delay, timeout, 0, False
        self._room = Placeholders(grid, math.prod(grid) // merge**2)
        self._encode_options = _options(self.tokenizer.encode, add_special_tokens=False)
        self._decode_options = _options(self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found = self._encode(placeholder) if sees else []
        self.image_token_id = found[0] if len(found) == 1 else None
        self._facts = Facts(
            model=model,
            engine="scripted",
            engine_version="1",
            weights_version=weights_version,
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            template_hash=template_hash(self.chat_template),
            sees=sees,
            context_length=context_length,
            extra={"image_token_id": self.image_token_id, "processor_hash": self.processor_hash},
        )

    @property
    def facts(self) -> Facts:
        return self._facts

    def placeholders(self, image: Image) -> Placeholders:
        """The same room for every picture: the ``grid`` it was made with."""
        return self._room

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        started = time.perf_counter()
        version = self._facts.weights_version
        images = self._admit(prompt)
        request = Request(prompt, self._decode(prompt.ids), sampling, self._calls)
        self._calls += 1
        self.requests.append(request)
        reply = await self._in_time(self._reply(request))
        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        ids, logprobs, stopped = _draw(self._tickets(reply, sampling), sampling, random.Random(seed))
        return Generation(ids, logprobs, "stop" if stopped else "length", version, images, seconds=time.perf_counter() - started, seed=seed)

    async def score(self, prompt: Prompt, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
        """Asks the script again, so a list, which is used up as it is played, cannot score."""
        self._admit(prompt)
        if isinstance(self._replies, Sequence):
            raise RequestRefused("expected a dict or a function of replies to score with, got a list, used up in playing")
        reply = await self._in_time(self._reply(Request(prompt, self._decode(prompt.ids), sampling, -1)))
        return _score(self._tickets(reply, sampling), ids, sampling)

    async def load(self, weights: str, version: str) -> None:
        self._facts = replace(self._facts, weights_version=version)

    async def aclose(self) -> None:
        self._closed = True

    def _admit(self, prompt: Prompt) -> tuple[ImageFacts, ...]:
        if self._closed:
            raise BackendUnavailable("the scripted engine is closed; make another one")
        if prompt.pictures and not self._facts.sees:
            raise RequestRefused(f"expected no picture, got {len(prompt.pictures)}: this engine was made with sees=False")
        if len(prompt.ids) >= self._facts.context_length:
            raise RequestRefused(f"expected fewer than {self._facts.context_length} prompt ids, got {len(prompt.ids)}")
        return locate(prompt, (self._room,) * len(prompt.pictures), self.image_token_id, self.processor_hash)

    async def _in_time(self, reply: Awaitable[Reply]) -> Reply:
        try:
            return await asyncio.wait_for(reply, self._timeout)
        except TimeoutError as error:
            raise BackendTimeout(f"no scripted reply came within {self._timeout} s") from error

    async def _reply(self, request: Request) -> Reply:
        if self._delay:
            await asyncio.sleep(self._delay)
        reply = self._look_up(request)
        if inspect.isawaitable(reply):
            reply = await reply
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _look_up(self, request: Request) -> Reply | Awaitable[Reply]:
        if callable(self._replies):
            return self._replies(request)
        if isinstance(self._replies, Mapping):
            ends = {key: request.text.rfind(key) + len(key) for key in self._replies if key in request.text}
            if not ends:
                raise BackendError(f"expected one of the scripted keys {sorted(self._replies)!r} in the prompt, got {request.text!r}")
            return self._replies[max(ends, key=lambda key: (ends[key], len(key)))]
        if request.index >= len(self._replies):
            raise BackendError(f"expected at most {len(self._replies)} calls, got one more: the list of replies is used up")
        return self._replies[request.index]

    def _tickets(self, reply: Reply, sampling: Sampling) -> list[Ticket]:
        if isinstance(reply, tuple):
            return [(tuple(reply), 1.0)]
        if isinstance(reply, str):
            return [(self._closed_off(reply, sampling), 1.0)]
        if not isinstance(reply, Mapping):
            raise TypeError(f"expected a scripted reply (text, ids, lottery or exception), got {reply!r}")
        if not reply or not sampling.stop_ids or min(reply.values()) <= 0:
            raise RequestRefused(f"expected positive weights, and stop ids to tell the texts apart, got {reply!r}")
        return [(self._closed_off(text, sampling), weight) for text, weight in reply.items()]

    def _closed_off(self, text: str, sampling: Sampling) -> tuple[int, ...]:
        ids = self._encode(text)
        return tuple(ids) if set(ids) & set(sampling.stop_ids) else (*ids, *sampling.stop_ids[:1])

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, **self._encode_options))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), **self._decode_options)


def _branches(tickets: list[Ticket], depth: int, sampling: Sampling) -> dict[int, float]:
    """Probability of each next token, after temperature and truncation, likeliest first."""
    mass: dict[int, float] = {}
    for ids, weight in tickets:
        mass[ids[depth]] = mass.get(ids[depth], 0.0) + weight
    power = 1 / sampling.temperature if sampling.temperature else 1.0
    top = max(mass.values())
    tempered = {token: (weight / top) ** power for token, weight in sorted(mass.items(), key=lambda item: -item[1])}
    kept = list(tempered)[: sampling.top_k or None] if sampling.temperature else list(tempered)
    total, reached, nucleus = sum(tempered[token] for token in kept), 0.0, dict[int, float]()
    for token in kept:
        if reached >= sampling.top_p * total and sampling.temperature:
            break
        nucleus[token] = tempered[token]
        reached += tempered[token]
    return {token: weight / reached for token, weight in nucleus.items()}


def _draw(tickets: list[Ticket], sampling: Sampling, dice: random.Random) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    """Sampled ids, their log-probs, and whether the text came to its own end."""
    ids: list[int] = []
    logprobs: list[float] = []
    while any(len(ticket) > len(ids) for ticket, _ in tickets):
        if len(ids) == sampling.max_tokens:
            return tuple(ids), tuple(logprobs), False
        chances = _branches(tickets, len(ids), sampling)
        token = dice.choices(list(chances), list(chances.values()))[0] if sampling.temperature else next(iter(chances))
        tickets = [ticket for ticket in tickets if ticket[0][len(ids)] == token]
        ids.append(token)
        logprobs.append(math.log(chances[token]))
        if token in sampling.stop_ids:
            break
    return tuple(ids), tuple(logprobs), True


def _score(tickets: list[Ticket], ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
    logprobs: list[float] = []
    for depth, token in enumerate(ids):
        tickets = [ticket for ticket in tickets if len(ticket[0]) > depth]
        chances = _branches(tickets, depth, sampling) if tickets else {}
        logprobs.append(math.log(chances[token]) if token in chances else -math.inf)
        tickets = [ticket for ticket in tickets if ticket[0][depth] == token]
    return tuple(logprobs)


def _options(method: Callable[..., object], **wanted: bool) -> dict[str, bool]:
    """Those of ``wanted`` that a tokenizer's method takes, so that any object with encode and decode serves."""
    taken = inspect.signature(method).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return wanted
    return {name: value for name, value in wanted.items() if name in {parameter.name for parameter in taken}}
