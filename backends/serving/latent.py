"""Starts a server whose model takes latent steps (``models/monologue_latent``), and says which of its ids are thoughts.

    thinking = Thinking(id=..., after=..., steps=3)                             # text models: Coconut
    thinking = Thinking.of(Habit.load(folder), config, after=..., room=64)      # a thinker of ours, pictures and all
    launch(model, flags=thinking.flags(config), extra=environment(config), ...)

The server samples thoughts' ids with log-prob 0 wherever one must stand; a client counts them as positions, not as words. What was chosen
stands in them: the j-th place of the pictures is ``id + 1 + j``. The same model in process is ``perception.ivtlr``, and both give the same
choices and log-probs (tests_real/served).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monologue.backends.base import BackendError, Generation, ImageFacts, Prompt, RequestRefused, Sampling, Thought

if TYPE_CHECKING:
    from monologue.backends.latent import Habit

MODELS = Path(__file__).parent / "models"
PACKAGE = "monologue_latent"
NO_GRAPHS = ("--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled")
"""A forward that is captured would read words where thoughts stand."""
TEXT = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
SEEING = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")


def _architecture(config: Any) -> str:
    """Raises ValueError for a configuration that does not name one."""
    named = list(config.architectures or ())
    if len(named) != 1:
        raise ValueError(f"expected one name under 'architectures' in the model's config.json, got {named!r}")
    return str(named[0])


def environment(config: Any) -> dict[str, str]:
    """What a server of a checkpoint with this configuration finds its model by."""
    architecture = _architecture(config)
    own = {"PYTHONPATH": str(MODELS), "SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE}
    if architecture in TEXT:
        return own
    return {**own, "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": PACKAGE, "SGLANG_EXTERNAL_MM_MODEL_ARCH": f"Latent{architecture}"}


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where and how a served model takes latent steps."""

    id: int
    """Stands for a thought; never a word. May lie behind the vocabulary."""
    after: tuple[int, ...]
    """Thoughts follow these ids, one behind the other, in a prompt or sampled."""
    steps: int
    """How many; at most, where the model stops by itself."""
    patches: int = 0
    """Places of the pictures that a step reads again."""
    patches_first: bool = False
    """They stand before the thought of their step, not behind it."""
    room: int = 0
    """Most places that a sequence's pictures have; so many ids behind ``id`` name them."""
    think: int | None = None
    """Word by which a state says that it has not finished; None: the number of steps is fixed."""

    def __post_init__(self) -> None:
        """Raises ValueError where thoughts follow nothing."""
        if not isinstance(self.after, tuple) or not self.after:
            raise ValueError(f"expected a tuple of ids after which thoughts follow, got {self.after!r}")

    @classmethod
    def of(cls, habit: Habit, config: Any, after: Sequence[int], room: int) -> Thinking:
        """As a checkpoint with this configuration was taught, its thoughts named by ids behind its vocabulary.

        Raises ValueError for a habit that a server cannot follow, BackendError for one that the model cannot.
        """
        mode = habit.mode
        wanted = {"thought": "state", "selects": "row", "positions": "mrope", "bottleneck": "off", "arrangement": "raster", "reuse": False}
        strange = [f"{name}={getattr(mode, name)!r}" for name, value in wanted.items() if getattr(mode, name) != value]
        if strange or mode.patches == "random":
            raise ValueError(f"a server does not take latent steps with {', '.join(strange) or 'random patches'}; they run in process")
        k = 0 if mode.patches == "none" else mode.k
        first = int(config.get_text_config().vocab_size)
        habit.check(first)
        return cls(first, tuple(after), habit.steps, k, mode.order == "patches-first", room if k else 0, habit.think)

    def flags(self, config: Any) -> tuple[str, ...]:
        """Of the server, for a checkpoint with this configuration. Raises ValueError for one that has no latent twin."""
        architecture = _architecture(config)
        if architecture not in (*TEXT, *SEEING) or (self.patches and architecture in TEXT):
            known = ", ".join(SEEING if self.patches else (*TEXT, *SEEING))
            raise ValueError(f"expected one of {known}, got {architecture!r}: its latent steps run in process only")
        order = "patches-first" if self.patches_first else "state-first"
        facts = {"id": self.id, "after": list(self.after), "steps": self.steps, "patches": self.patches, "order": order, "room": self.room}
        told: dict[str, Any] = {"architectures": [f"Latent{architecture}"], "latent": {**facts, "think": self.think}}
        size = max(int(config.get_text_config().vocab_size), self.id + self.room + 1)
        told |= {"vocab_size": size, **({} if architecture in TEXT else {"text_config": {"vocab_size": size}})}
        return "--json-model-override-args", json.dumps(told), *NO_GRAPHS

    @classmethod
    def told(cls, server: Mapping[str, Any]) -> Thinking | None:
        """As a server says that it was started; None where it takes no latent steps. Raises BackendError."""
        facts = json.loads(server.get("json_model_override_args") or "{}").get("latent")
        if facts is None:
            return None
        order, after = facts.pop("order", "state-first"), facts.get("after")
        if not isinstance(after, list) or not after:
            raise BackendError(f"expected a server that thinks after a list of ids, got {after!r}; start it again with this version")
        return cls(**{**facts, "after": tuple(after)}, patches_first=order == "patches-first")

    @property
    def places(self) -> int:
        """Most places that thoughts take between prompt and reply."""
        return self.steps * (self.patches + 1)

    def admit(self, prompt: Prompt, images: Sequence[ImageFacts]) -> None:
        """Raises RequestRefused for a prompt over which the server would not think, or not as in process."""
        if (found := prompt.ids[-len(self.after) :]) != self.after:
            raise RequestRefused(f"the server thinks after the ids {self.after}; expected a prompt that ends with them, got {found}")
        seen = sum(image.placeholder_count for image in images)
        if self.patches and not self.steps * self.patches <= seen <= self.room:
            least = f"{self.steps * self.patches} (steps x patches)"
            raise RequestRefused(
                f"expected pictures with {least} to {self.room} places for a server that thinks, got {seen}; think in process"
            )

    def again(self, prompt: Prompt, images: Sequence[ImageFacts]) -> tuple[int, ...]:
        """The ids of the thoughts that a trace holds (``Prompt.chosen``), for scoring what was said after them. Raises RequestRefused."""
        self.admit(prompt, images)
        if prompt.chosen is None:
            raise RequestRefused("a server that thinks scores a reply after thoughts that are given: Prompt.chosen, from the trace")
        seen = sum(image.placeholder_count for image in images)
        whole = all(len(set(step)) == len(step) == self.patches and all(0 <= patch < seen for patch in step) for step in prompt.chosen)
        if not whole or len(prompt.chosen) > self.steps or (self.think is None and len(prompt.chosen) < self.steps):
            told = f"{self.steps} steps of {self.patches} patches below {seen}"
            raise RequestRefused(f"expected {told} in Prompt.chosen, got {prompt.chosen!r}; score in process instead")
        return self.spelled(prompt.chosen)

    def spelled(self, chosen: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The ids of steps with these patches."""
        ids: list[int] = []
        for step in chosen:
            patches = [self.id + 1 + patch for patch in step]
            ids += [*patches, self.id] if self.patches_first else [self.id, *patches]
        return tuple(ids)

    def apart(self, found: Generation, sampling: Sampling) -> Generation:
        """A reply without the thoughts before it, which are told beside; no longer than was asked for.

        Raises BackendError for thoughts that are not whole, and for some in the midst of words.
        """
        count = next((place for place, token in enumerate(found.ids) if token < self.id), len(found.ids))
        width, end = self.patches + 1, min(len(found.ids), count + sampling.max_tokens)
        steps = [found.ids[first : first + width] for first in range(0, count, width)]
        chosen = [tuple(token - self.id - 1 for token in step if token > self.id) for step in steps]
        if self.spelled(chosen) != found.ids[:count] or any(token >= self.id for token in found.ids[count:]):
            raise BackendError(f"expected whole thoughts and then words from a server that thinks, got the ids {list(found.ids[:32])}")
        if self.think is None and len(steps) != self.steps:
            raise BackendError(f"expected {self.steps} latent steps before the reply, got {len(steps)}")
        parts = ((name, max(first, count) - count, min(last, end) - count) for name, first, last in found.weights)
        weights = tuple(part for part in parts if part[1] < part[2])
        return replace(
            found,
            ids=found.ids[count:end],
            logprobs=None if found.logprobs is None else found.logprobs[count:end],
            thoughts=tuple(Thought(chosen=patches) for patches in chosen),
            weights=weights if len(weights) > 1 else (),
            weights_version=weights[-1][0] if weights else found.weights_version,
            finish_reason=found.finish_reason if end == len(found.ids) else "length",
        )
