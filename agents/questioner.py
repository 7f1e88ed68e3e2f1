"""The seat that asks and concludes: what it hears, what it may do.

It never sees a picture. It acts by calls: ``look`` asks the answerer, ``conclude`` ends, further tools are the builder's.
Everything here is a pure function of plain values, so any graph can seat a questioner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monologue.agents.messages import Conclude, Look, Message, ParseFault, ToolUse
from monologue.agents.prompts import Wording

KINDS = (Look, Conclude, ToolUse)
"""The actions of this seat."""


def _function(name: str, description: str, properties: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


LOOK = _function(
    "look",
    "Ask somebody who sees the picture one short question about it.",
    {
        "question": {"type": "string", "description": "The question."},
        "region": {
            "type": "array",
            "items": {"type": "number"},
            "description": "Optional part to enlarge: left, top, right, bottom as fractions of the picture from 0 to 1.",
        },
    },
    ["question"],
)
CONCLUDE = _function(
    "conclude",
    "End with the answer.",
    {
        "answer": {"type": "string", "description": "The answer; one of the choices where there are any."},
        "explanation": {"type": "string", "description": "Why, in one sentence."},
    },
    ["answer"],
)


def opening(wording: Wording, question: str, choices: Sequence[str], caption: str | None = None) -> list[Message]:
    """The first messages: what this seat is for, and the problem; with a caption where somebody described the picture."""
    text = question if caption is None else wording.captioned.format(caption=caption, question=question)
    system = [Message("system", wording.questioner)] if wording.questioner else []
    return [*system, Message("user", text, choices=tuple(choices))]


def reply_heard(text: str) -> list[Message]:
    """The answerer's reply, or a tool's result."""
    return [Message("tool", text)]


def unanswered(wording: Wording, fault: ParseFault) -> list[Message]:
    """The answerer said nothing that is an answer."""
    return [Message("tool", wording.unanswered.format(reason=fault.reason))]


def corrected(wording: Wording, fault: ParseFault) -> list[Message]:
    """This seat's own last reply was no action."""
    return [Message("tool" if not wording.questioner else "user", wording.fault.format(reason=fault.reason))]
