"""What of a play may reach the disk: all of it, its shape only, or all of it after a redaction of one's own.

    capture="shape"    spans, times, counts, token counts, edges, rewards and the hashes of pictures; no text, no token ids, no pictures
    redact=callable    every text passes through it before it is written: problem, messages, replies, tool calls, answers, errors

Token ids spell the text, and a stream's later prompts begin with its earlier ids. So a call whose text was changed loses its ids and
log-probs, all later calls of its stream lose theirs, and none of them can be trained on; each says so itself (``monologue.capture``), and
``monologue verify`` counts them. Filtering happens before a span gets its attributes: what further processors see is filtered too.

Not covered: pictures under a redaction (draw over them before they are played), names of tools, roles and problems, run.json, and what a
builder sets on a span by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from monologue.traces import names
from monologue.traces.images import REFERENCE
from monologue.traces.schema import Attribute, EpisodeStart, attributes_of

Capture: TypeAlias = Literal["all", "shape"]
Redact: TypeAlias = Callable[[str], str]
IDS = (names.PROMPT_DELTA, names.SAMPLED_IDS, names.SAMPLED_LOGPROBS, names.SAMPLED_ENTROPIES, names.LOSS_MASK)
WORDS = (names.INPUT_MESSAGES, names.OUTPUT_MESSAGES, names.OUTPUT, names.ACTION, names.PARSE_ERROR)
SAID = (*WORDS, names.TOOL_ARGUMENTS, names.TOOL_RESULT, names.ERROR)
FIXED = frozenset({"type", "role", "modality", "mime_type", "kind", "finish_reason"})
"""Keys of messages and actions whose values are no text of anybody."""


@dataclass(frozen=True)
class Privacy:
    """A rule for everything that is recorded."""

    capture: Capture = "all"
    """How much is kept."""
    redact: Redact | None = None
    """What texts pass through."""

    def __post_init__(self) -> None:
        if self.capture not in ("all", "shape"):
            raise ValueError(f"capture must be 'all' or 'shape', got {self.capture!r}")

    @property
    def open(self) -> bool:
        """Everything is written as it is."""
        return self.capture == "all" and self.redact is None

    def text(self, text: str) -> str | None:
        """What may be written of a text; None: nothing."""
        if self.capture == "shape":
            return None
        if self.redact is None:
            return text
        changed = self.redact(text)
        if not isinstance(changed, str):
            raise TypeError(f"redact must return the text that may be written, got {type(changed).__name__}")
        return changed

    def error(self, error: BaseException) -> str:
        """An exception in one line; its kind alone where its words may not be written."""
        name = type(error).__name__
        if self.open:
            return f"{name}: {error}"
        try:
            told = self.text(str(error))
        except Exception:
            return name
        return name if told is None else f"{name}: {told}"

    def start(self, start: EpisodeStart) -> EpisodeStart:
        """The problem, as far as it may be written. Without its choices the right one has no index."""
        if self.open:
            return start
        if self.capture == "shape":
            kept = {name: value for name, value in start.extra.items() if name in ("control", "partner") or not _holds_text(value)}
            facts: dict[str, Any] = {"question": "", "choices": (), "gold": None, "extra": {**kept, "capture": "shape"}}
        else:
            choices = tuple(str(self.text(choice)) for choice in start.choices)
            extra = {**self._walk(start.extra, ("control", "partner")), "capture": "redacted"}
            facts = {"question": self.text(start.question), "choices": choices, "extra": extra}
        return start.model_copy(update=facts)

    def call(self, call: Mapping[str, Any], redacted: set[str], stream: str) -> dict[str, Attribute]:
        """A call's attributes, as far as they may be written; ``redacted`` are the episode's streams that have lost their ids."""
        if self.open:
            return attributes_of(call)
        if self.capture == "shape":
            kept = {name: value for name, value in attributes_of(call).items() if name not in IDS + WORDS}
            return {**kept, names.TRAINABLE: False, names.CAPTURE: "shape"}
        words = {
            "messages": [self._json(message) for message in call["messages"]],
            "action": None if call["action"] is None else self._json(call["action"]),
            **{name: None if call[name] is None else self.text(call[name]) for name in ("output", "parse_error")},
        }
        if words["messages"] != list(call["messages"]) or any(words[name] != call[name] for name in ("action", "output", "parse_error")):
            redacted.add(stream)
        found = attributes_of({**call, **words})
        if stream not in redacted:
            return found
        return {**{name: value for name, value in found.items() if name not in IDS}, names.TRAINABLE: False, names.CAPTURE: "redacted"}

    def arguments(self, arguments: str) -> str | None:
        """A tool call's arguments, JSON, as far as they may be written."""
        return None if self.capture == "shape" else self._json(arguments, keys=True)

    def _json(self, text: str, keys: bool = False) -> str:
        plain = json.loads(text)
        changed = self._walk(plain, FIXED, keys)
        return text if changed == plain else json.dumps(changed, ensure_ascii=False)

    def _walk(self, value: Any, fixed: Any, keys: bool = False) -> Any:
        """The same with every text redacted; of what a model made up, the keys too."""
        if isinstance(value, str):
            return value if REFERENCE.fullmatch(value) else self.text(value)
        if isinstance(value, (list, tuple)):
            return [self._walk(one, fixed, keys) for one in value]
        if not isinstance(value, Mapping):
            return value
        return {
            self.text(key) if keys else key: one if key in fixed and not keys else self._walk(one, fixed, keys or key == "arguments")
            for key, one in value.items()
        }


def _holds_text(value: Any) -> bool:
    return not (value is None or isinstance(value, (bool, int, float)))
