"""The one protocol that every engine speaks: token ids in, token ids and log-probabilities out.

Why ids and not text: a policy gradient needs the tokens that were sampled and the probability with which they were sampled.
Text that is decoded and encoded again may come back as other tokens (non-canonical merges), so text never crosses this seam;
the codec of a model family (``monologue.agents.codec``) turns messages into ids before it and ids into actions after it.

Errors, by what the caller can do:

    BackendError                 the engine failed; names the engine and the request
    ├── BackendTimeout           no answer within the deadline; may be tried again
    ├── BackendUnavailable       not reachable or shutting down; may be tried again
    └── RequestRefused           the request can never succeed (too long, id outside the vocabulary, pictures that do not fit)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from monologue.traces.images import Picture

FinishReason = Literal["stop", "length", "abort"]
LATENT = "transformers-latent"
"""Name of the in-process engine when it thinks in latent steps before it speaks."""


__all__ = [
    "LATENT",
    "Backend",
    "BackendError",
    "BackendTimeout",
    "BackendUnavailable",
    "Facts",
    "FinishReason",
    "Generation",
    "ImageFacts",
    "Picture",
    "Prompt",
    "RequestRefused",
    "Sampling",
    "Spoken",
    "Thought",
]


class BackendError(Exception):
    """The engine failed on a request."""


class BackendTimeout(BackendError):
    """No answer came within the deadline."""


class BackendUnavailable(BackendError):
    """The engine cannot be reached, or is shutting down."""


class RequestRefused(BackendError):
    """The request can never succeed as it stands."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. ``temperature=0`` is greedy; its log-probs are those of the untempered distribution."""

    temperature: float = 1.0
    """Logits are divided by this before the softmax."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    max_tokens: int = 64
    """At most so many tokens are sampled."""
    seed: int | None = None
    """Same prompt, weights and seed give the same tokens, whatever else is in the batch. None draws a fresh seed."""
    stop_ids: tuple[int, ...] = ()
    """A sampled id of this set ends the generation; it is kept as the last sampled id."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or above, got {self.top_k!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens!r}")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the processor of a model made of a picture: enough to rebuild its input exactly."""

    sha256: str
    """Hash of the stored PNG file (key into the run's ``images/``)."""
    width: int
    height: int
    grid: tuple[int, int, int]
    """Patches along time, height and width before merging; (0, 0, 0) where the engine has no grid."""
    placeholder_start: int
    """Index of this picture's first placeholder in the prompt ids."""
    placeholder_count: int
    """Number of placeholders, i.e. of visual tokens that the language model sees."""
    processor_hash: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """What the ids of a prompt say, for engines that take words."""

    turns: tuple[Mapping[str, Any], ...]
    """The whole dialogue in the form of OpenAI's chat messages; a picture is a part ``{"type": "image", "picture": Picture}``."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Calls that may be made, as JSON function schemas."""
    force: str | None = None
    """Name of the call that must be made, whose first ids the prompt ends with; None leaves the choice."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy is given: ids with placeholders already expanded to each picture's grid, and the pictures in order."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()
    affinity: str = ""
    """Prompts of one growing stream share it, so that servers can keep them together."""
    spoken: Spoken | None = field(default=None, repr=False, compare=False)
    """The same in words; only engines that return text only read it."""
    chosen: tuple[tuple[int, ...], ...] | None = None
    """For replay: patches that each latent step is to read again, a tuple a step; only engines that think look at it. None: think anew."""


@dataclass(frozen=True, slots=True)
class Thought:
    """One latent step, as far as people can read it."""

    chosen: tuple[int, ...]
    """Patches that were read again, counted from 0 among the visual tokens of all pictures."""
    norm: float | None = None
    """Of the state that was fed back; None where the engine does not say."""
    words: tuple[str, ...] = ()
    """What the state was nearest to saying, likeliest first; empty where the engine does not say."""
    chances: tuple[float, ...] = ()
    """Probability of each of the words."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a policy returned. ``ids`` and ``logprobs`` have the same length."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    """Nats, of the distribution really sampled (temperature and truncation included). None: the engine returns text only."""
    finish_reason: FinishReason
    weights_version: str
    images: tuple[ImageFacts, ...] = ()
    cached_tokens: int | None = None
    """Prompt tokens served from a cache; None where the engine does not say."""
    seconds: float = 0.0
    """Wall time inside the engine, queueing included."""
    seed: int | None = None
    """The seed really used; None where the engine honours none."""
    weights: tuple[tuple[str, int, int], ...] = ()
    """(version, first, end) of the sampled ids where the weights changed in the middle; empty where they did not."""
    server: str = ""
    """Address of the server that answered; empty in process."""
    reported: tuple[int, int] | None = None
    """Prompt and reply as the engine counts and bills them, where that is in other tokens than these ids; None where it does not say."""
    entropies: tuple[float, ...] | None = None
    """Of the distribution behind each sampled id, nats; None where the engine does not say."""
    thoughts: tuple[Thought, ...] = ()
    """Latent steps taken before the first id."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine says about itself; recorded on every span."""

    model: str
    engine: str
    engine_version: str
    weights_version: str
    tokenizer_hash: str
    template_hash: str
    sees: bool
    """Accepts pictures."""
    context_length: int
    logprobs: bool = True
    """False: text only, refused for policy gradients."""
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """An engine. All coroutines are safe to call concurrently; cancelling one releases its place."""

    @property
    def facts(self) -> Facts: ...

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """Sample a continuation. Raises BackendError."""
        ...

    async def score(self, prompt: Prompt, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
        """Teacher-forced log-probs (nats) of ``ids`` after ``prompt`` under the distribution that ``sampling`` describes."""
        ...

    async def load(self, weights: str, version: str) -> None:
        """Take other weights (a folder with a checkpoint or adapter); later generations carry ``version``."""
        ...

    async def aclose(self) -> None: ...
