"""What is said to a policy and what it decides, free of any model family's tokens.

A message goes in, an action comes out; a codec (``monologue.agents.codec``) turns the one into ids and ids into the other. A
reply that does not parse is a ``ParseFault``: a value, not an exception, since a model's mistake is data and only our own
bugs are raised. Choices stand apart from the text because some families mark them with a token of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from monologue.backends.base import Picture

Speaker = Literal["system", "user", "assistant", "tool"]
Region: TypeAlias = "tuple[float, float, float, float]"
"""Left, top, right, bottom as fractions of width and height."""


@dataclass(frozen=True, slots=True)
class Look:
    """The questioner asks the answerer about the picture."""

    question: str
    """What the answerer is asked."""
    region: Region | None = None
    """Part of the picture to enlarge, as fractions; None shows the whole picture."""


@dataclass(frozen=True, slots=True)
class Conclude:
    """The questioner ends the monologue."""

    answer: str
    """The answer as the policy worded it; matching it to a choice is the scorer's business."""
    explanation: str = ""
    """Why, where the policy said so."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The policy calls one of the builder's tools."""

    name: str
    """Name of the tool."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments by name, JSON values."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Plain words: what an answerer says."""

    text: str
    """The words, outer spaces removed; never empty."""


@dataclass(frozen=True, slots=True)
class ParseFault:
    """A reply that is no action: the model's fault, recorded on its turn and answered with a short correction."""

    reason: str
    """What was expected and what came, in one sentence."""
    text: str
    """The reply as decoded text."""


Action: TypeAlias = "Look | Conclude | ToolUse | Reply"


@dataclass(frozen=True, slots=True)
class Message:
    """One thing said to, or earlier by, a policy."""

    role: Speaker
    """Who speaks."""
    text: str = ""
    """The words."""
    pictures: tuple[Picture, ...] = ()
    """Pictures shown before the words."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, listed after the words."""
    action: Action | None = None
    """What an assistant message did; None for other speakers."""


def plain(action: Action) -> dict[str, Any]:
    """An action as JSON values, for traces and graph state: ``{"kind": "look", "question": ...}``; fields left empty are left
    out.
    """
    kind = {Look: "look", Conclude: "conclude", ToolUse: "tool", Reply: "reply"}[type(action)]
    return {"kind": kind, **{name: value for name, value in asdict(action).items() if value not in (None, "")}}


def plain_message(message: Message) -> dict[str, Any]:
    """A message in the shape of the GenAI conventions; pictures by hash, never inline."""
    parts: list[dict[str, Any]] = [
        {"type": "uri", "modality": "image", "uri": f"images/{picture.sha256}.png"} for picture in message.pictures
    ]
    if message.text:
        parts.append({"type": "text", "content": message.text})
    if message.choices:
        parts.append({"type": "choices", "choices": list(message.choices)})
    if message.action is not None:
        parts.append({"type": "action", "action": plain(message.action)})
    return {"role": message.role, "parts": parts}
