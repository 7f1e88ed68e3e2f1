"""A row as messages, for tools that take nothing else. Not exact, and never called so: such a tool applies a template of its own.

An assistant message is the parsed action in the words that chat models use (a reply as it is, a call as ``<tool_call>`` with JSON);
a reply that did not parse stands as it was said. Choices follow their question on a line of their own.

Left out: rows that messages cannot tell or would teach wrongly (``unsayable``); exports count them by cause. The schemas of tools
are not among a trace's messages: hand them to the trainer as its ``tools``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monologue.traces.schema import PolicyCall
from monologue.training.exports.writing import Told


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    role: str
    """system, user, assistant or tool."""
    text: str
    """The words."""
    pictures: tuple[str, ...] = ()
    """Hashes of the pictures shown before the words."""


def unsayable(one: Told) -> str | None:
    """Why no list of messages says what this row says; None where one does."""
    turns = [call.turn for call in one.calls]
    shown = sum(len(turn.pictures) for call in one.calls for turn in heard(call))
    if turns != list(range(len(turns))) or shown != len(one.row.images) or not all(call.messages for call in one.calls):
        return "row whose prompt is known as ids only (its stream broke, or grew over a failed try)"
    if any(not all(piece.loss_mask) for piece in one.row.pieces):
        return "row with ids that must not be trained on, which messages cannot mark"
    if any(call.truncated for call in one.calls):
        return "row with a reply that was cut off, which a template would end"
    return None


def dialogue(one: Told) -> list[Turn]:
    """The row's messages in order, each call's reply behind what it heard."""
    return [turn for call in one.calls for turn in (*heard(call), said(call))]


def heard(call: PolicyCall) -> list[Turn]:
    """The messages that were new to this call."""
    return [_turn(json.loads(message)) for message in call.messages]


def said(call: PolicyCall) -> Turn:
    """The reply."""
    return Turn("assistant", call.output if call.action is None else _spoken(json.loads(call.action)))


def _turn(message: dict[str, Any]) -> Turn:
    parts: Sequence[dict[str, Any]] = message["parts"]
    texts = [_words(part) for part in parts if part["type"] != "uri"]
    pictures = tuple(part["uri"].removeprefix("images/").removesuffix(".png") for part in parts if part["type"] == "uri")
    return Turn(message["role"], "\n".join(texts), pictures)


def _words(part: dict[str, Any]) -> str:
    if part["type"] == "text":
        return str(part["content"])
    if part["type"] == "choices":
        return "Choices: " + ", ".join(part["choices"])
    if part["type"] == "action":
        return _spoken(part["action"])
    raise ValueError(f"a message part of the unknown type {part['type']!r}")


def _spoken(action: dict[str, Any]) -> str:
    facts = dict(action)
    kind = facts.pop("kind")
    if kind == "reply":
        return str(facts["text"])
    name, arguments = (facts["name"], facts.get("arguments", {})) if kind == "tool" else (kind, facts)
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"
