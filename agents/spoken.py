"""Messages in the form of OpenAI's chat messages, for engines that take words.

That form is stricter than ours: a tool's result must follow a call, and a call must be followed by its result. So a reply that was no
action stands there as the text that it was, and whatever is heard first after a call is that call's result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from monologue.agents.messages import Action, Message, ParseFault, Reply, ToolUse, plain
from monologue.agents.prompts import CHOICES

Turn: TypeAlias = "Mapping[str, Any]"


def with_choices(message: Message) -> str:
    """The words, and the answers to choose from."""
    return message.text + (CHOICES.format(choices=", ".join(message.choices)) if message.choices else "")


def named(action: Action) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an action that is a call."""
    if isinstance(action, ToolUse):
        return action.name, action.arguments
    arguments = plain(action)
    return arguments.pop("kind"), arguments


def reply(action: Action | ParseFault) -> Message:
    """What a policy did, as a message of its dialogue."""
    return Message("assistant", action.text) if isinstance(action, ParseFault) else Message("assistant", action=action)


def grown(turns: tuple[Turn, ...], messages: Iterable[Message]) -> tuple[Turn, ...]:
    """The dialogue with further messages at its end; what is empty is not said."""
    for message in messages:
        waiting = next((call["id"] for call in turns[-1].get("tool_calls", ())), None) if turns else None
        turns = (*turns, *_turns(message, waiting, f"call{len(turns)}"))
    return turns


def _turns(message: Message, waiting: str | None, number: str) -> Iterable[Turn]:
    text, pictures = with_choices(message), [{"type": "image", "picture": picture} for picture in message.pictures]
    if message.role == "assistant":
        if message.action is not None and not isinstance(message.action, Reply):
            name, arguments = named(message.action)
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            yield {"role": "assistant", "content": "", "tool_calls": [{"id": number, "type": "function", "function": function}]}
            return
        text = message.action.text if message.action else text
    elif waiting:
        yield {"role": "tool", "content": text, "tool_call_id": waiting}
        text = ""
    role = "user" if message.role == "tool" else message.role
    if pictures:
        yield {"role": role, "content": [*pictures, {"type": "text", "text": text}] if text else pictures}
    elif text:
        yield {"role": role, "content": text}
