"""A hosted chat model in a seat: a teacher whose words are put into ids by a codec.

With ``retokenize`` that is the codec of the student who is to learn from it, so the trace is in the student's own ids and can be imitated
as it lies. Nothing was sampled in them, so there are no log-probs, and policy gradients refuse such rows. Without it the ids are the bytes
of a transcript: the trace is whole and can be looked at, but nobody is trained on it.

A reply is never mended. Where it makes one call that fits, its ids are that action's; otherwise they are what was said, and the codec finds
the fault in them as it would in any policy's. A reply that the codec would read as another kind of action than was meant is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from monologue.agents.chat import ChatCodec, read_call
from monologue.agents.codec import Codec, CodecError, Force, Ids
from monologue.agents.messages import Action, Conclude, ParseFault, Reply, ToolUse
from monologue.agents.policy import Policy
from monologue.agents.prompts import CHAT
from monologue.agents.spoken import named
from monologue.backends.base import Prompt, Spoken
from monologue.backends.chat import ChatBackend, Said
from monologue.backends.pictures import Eyes, Placeholders
from monologue.backends.tokens import ByteTokenizer, template_hash

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

PLACEHOLDER = "<|image_pad|>"


class Transcript(ByteTokenizer):
    """UTF-8 bytes with the marks of a chat template, for words that no model of ours reads."""

    chat_template = "transcript-1"
    eos_token, eos_token_id = "<|im_end|>", 1

    def __init__(self) -> None:
        super().__init__(("<|im_start|>", "<|im_end|>", PLACEHOLDER))
        self.all_special_tokens = [*self.specials, "<tool_call>", "</tool_call>"]

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> str:
        """Each message between its marks; tools are listed as JSON before the first."""
        listed = [{"role": "tools", "content": "\n".join(map(json.dumps, tools))}] if tools else []
        said = "".join(f"<|im_start|>{one['role']}\n{_shown(one)}<|im_end|>\n" for one in [*listed, *messages])
        return f"{said}<|im_start|>assistant\n"


def _shown(message: dict[str, Any]) -> str:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join(PLACEHOLDER if part["type"] == "image" else part["text"] for part in parts)
    return text + "".join(f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in message.get("tool_calls", ()))


class Marked:
    """Eyes of a transcript: a picture is one mark."""

    image_token_id = 2
    processor_hash = template_hash(Transcript.chat_template)

    def placeholders(self, image: Image) -> Placeholders:
        return Placeholders((0, 0, 0), 1)


class Blind:
    """Eyes of a student that has none."""

    image_token_id = None
    processor_hash = ""

    def placeholders(self, image: Image) -> Placeholders:
        raise CodecError(
            "the teacher was shown a picture but lent no eyes; pass hosted(model, codec, eyes=engine) with the student's engine"
        )


def hosted(
    model: BaseChatModel,
    retokenize: Codec | None = None,
    *,
    eyes: Eyes | None = None,
    policy_id: str = "",
    timeout: float = 120.0,
    attempts: int = 4,
) -> Policy:
    """A policy that a LangChain chat model plays, sampled as the model itself is set.

    ``retokenize`` is the codec of the student that will imitate it, with ``eyes``, the student's engine, where pictures are shown. Without
    it the trace is not trainable. ``timeout`` bounds a call in seconds, all its ``attempts`` included.
    Raises ValueError for eyes without a codec; playing raises BackendError, and CodecError where the codec has no tokens for what was said.
    """
    if eyes is not None and retokenize is None:
        raise ValueError("eyes belong to a student, whose codec is missing; pass hosted(model, student.codec, eyes=student.backend)")
    codec = retokenize or ChatCodec(Transcript(), 1, PLACEHOLDER)
    seen: Eyes = eyes or (Blind() if retokenize else Marked())
    backend = ChatBackend(
        model,
        lambda said, prompt: ids_of(codec, said, prompt),
        seen,
        tokenizer_hash=codec.tokenizer_hash,
        template_hash=codec.template_hash,
        brief=brief,
        timeout=timeout,
        attempts=attempts,
    )
    return Policy(backend, codec, policy_id=policy_id or backend.facts.model, trainable=retokenize is not None)


def brief(spoken: Spoken) -> str:
    """What a seat is for, told to a teacher whose student needs no telling."""
    return CHAT.questioner if spoken.tools else CHAT.answerer


def ids_of(codec: Codec, said: Said, prompt: Prompt) -> Ids:
    """The ids of a reply, without those of the forced call that the prompt ends with. Raises CodecError where the codec has no tokens for
    it, or would read another kind of action in them.
    """
    meant = _meant(said)
    force: Any = prompt.spoken.force if prompt.spoken else None
    forced = codec.force(force) if force else ()
    ids = _verbatim(codec, said) if isinstance(meant, ParseFault) else _behind(codec, meant, forced)
    if said.cut and ids[-1:] == codec.stop_ids[:1]:
        ids = ids[:-1]
    read = codec.parse((*forced, *ids))
    if not isinstance(read, _kinds(meant, force)):
        told = said.calls or said.text
        raise CodecError(f"the model said {told!r}, in which the student's codec would read {read!r}; nothing is made of it")
    return ids


def _meant(said: Said) -> Action | ParseFault:
    if len(said.calls) > 1 or not (said.calls or said.text):
        return ParseFault("one call or some words were expected.", said.text)
    if not said.calls:
        return Reply(said.text)
    name, arguments = said.calls[0]
    if isinstance(arguments, str):
        return ParseFault("the arguments are no JSON object.", said.text)
    return read_call(name, dict(arguments), said.text)


def _kinds(meant: Action | ParseFault, force: Force | None) -> tuple[type, ...]:
    """What may be read: words, or another call, in the place of a forced call are a fault, and a fault is never read as a call."""
    if isinstance(meant, ParseFault):
        return (ParseFault, Reply)
    name = None if isinstance(meant, Reply) else named(meant)[0]
    return (type(meant) if name == force or force is None else ParseFault,)


def _behind(codec: Codec, action: Action, forced: Ids) -> Ids:
    """An action's ids behind those that force its kind. A language that explains before it concludes has no room left for that then."""
    bare = replace(action, explanation="") if isinstance(action, Conclude) else action
    for said in (action, bare):
        ids = codec.action_ids(said)
        if ids[: len(forced)] == forced:
            return ids[len(forced) :]
    return codec.action_ids(action)


def _verbatim(codec: Codec, said: Said) -> Ids:
    """Words and calls one after the other, whatever is wrong with them."""
    parts: list[Action] = [Reply(said.text)] if said.text else []
    for name, arguments in said.calls:
        if isinstance(arguments, str):
            parts.append(Reply(f"<tool_call>{name} {arguments}</tool_call>"))
        else:
            read = read_call(name, dict(arguments), "")
            parts.append(ToolUse(name, dict(arguments)) if isinstance(read, ParseFault) else read)
    ids = [number for part in parts for number in codec.action_ids(part) if number not in codec.stop_ids]
    return (*ids, *codec.stop_ids[:1])
