"""Messages to ids and ids to actions: the only place that knows a model family's tokens.

A stream of ids is opened once and from then on only extended; nothing that was sampled is ever decoded and encoded again. So
a codec never renders a dialogue anew: ``open`` renders its beginning, ``extend`` what comes after a sampled reply, and the
sampled ids stay as they were sampled. ``force`` gives the ids that begin an action; put at a prompt's end they leave the
policy no other kind of action.

``TinyCodec`` is the language of the starter policies, one token per word:

    questioner   <bos> <user> QUESTION <choice> red <choice> blue <assistant>     says  <look> where is the red star ? <eos>
                 <tool> b2 <assistant>                                            says  <conclude> red <eos>
    answerer     <bos> <user> PICTURE where is the red star ? <assistant>         says  b2 <eos>
                 <user> what colour is at b3 ? <assistant>                        says  red <eos>
    PICTURE      <|vision_start|> <|image_pad|> ... <|image_pad|> <|vision_end|>

``<because> WORDS <conclude> red`` weighs before it concludes; the other order is understood too. Text that holds a word outside
the vocabulary, or the name of a special token, is refused by name: neither ``<unk>`` nor a forged token slips into a prompt.
``ChatCodec`` for models with a chat template stands in ``monologue.agents.chat``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeAlias

from monologue.agents.messages import Action, Conclude, Look, Message, ParseFault, Reply, ToolUse
from monologue.agents.prompts import TINY, Wording
from monologue.backends.base import Picture
from monologue.backends.tokens import SPECIALS, template_hash, tokenizer_hash

Ids: TypeAlias = "tuple[int, ...]"
Schema: TypeAlias = "Mapping[str, Any]"
"""A tool as a JSON function schema: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""
Force = Literal["look", "conclude"]
VisualTokens: TypeAlias = "int | Callable[[Picture], int] | None"


class CodecError(ValueError):
    """Words, pictures or tools that this codec cannot put into its model's tokens."""


class Codec(Protocol):
    """How one model family reads messages and writes actions. Stateless; one instance serves all streams."""

    @property
    def wording(self) -> Wording: ...

    @property
    def stop_ids(self) -> Ids: ...

    @property
    def tokenizer_hash(self) -> str: ...

    @property
    def template_hash(self) -> str: ...

    @property
    def ending(self) -> Ids:
        """What every prompt ends with, whatever was said, and no reply holds: where a reply begins. Raises CodecError where that is nothing
        certain.
        """
        ...

    def open(self, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> Ids:
        """The first prompt of a stream, generation prompt and expanded picture placeholders included. Raises CodecError."""
        ...

    def extend(self, messages: Sequence[Message], closed: bool = True) -> Ids:
        """What follows a sampled reply, generation prompt included; ``closed`` says whether that reply ended with a stop id."""
        ...

    def force(self, kind: Force) -> Ids:
        """The ids with which an action of this kind begins; the policy continues them."""
        ...

    def parse(self, ids: Sequence[int]) -> Action | ParseFault:
        """The action that (forced and) sampled ids say."""
        ...

    def action_ids(self, action: Action) -> Ids:
        """The ids that say this action, stop id included. Inverse of ``parse``."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """The ids as text, special tokens shown."""
        ...


def visual_tokens(count: VisualTokens, picture: Picture) -> int:
    """Placeholders that a picture takes in a prompt."""
    if count is None:
        raise CodecError("a picture was shown to a policy that does not see; seat a policy with an image processor there")
    return count if isinstance(count, int) else count(picture)


TINY_LAYOUT = "tiny-1"
OPENERS = {"user": "<user>", "tool": "<tool>", "assistant": "<assistant>"}
MARKS = ("<look>", "<conclude>", "<because>")


class TinyCodec:
    """The starter policies' language; see the module's docstring."""

    wording = TINY

    def __init__(self, tokenizer: Any, visual_tokens: VisualTokens = 9) -> None:
        """``tokenizer`` encodes, decodes and knows the tokens of ``backends.tokens.SPECIALS``; ``visual_tokens`` are the
        placeholders of a picture.
        """
        self._tokenizer = tokenizer
        self._encode = lru_cache(maxsize=4096)(self._encode_words)  # the same questions and choices come again and again
        self._ids: dict[str, int] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
        if None in self._ids.values() or len(set(self._ids.values())) < len(SPECIALS):
            raise CodecError(f"TinyCodec needs a tokenizer with the tokens {' '.join(SPECIALS)}; this one lacks some of them")
        self._names = {number: name for name, number in self._ids.items()}
        self._count = visual_tokens
        self._eos = self._ids["<eos>"]
        self.ending: Ids = (self._ids["<assistant>"],)
        self.stop_ids: Ids = (self._eos,)
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.template_hash = template_hash(TINY_LAYOUT)

    def open(self, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> Ids:
        foreign = [name for name in (tool["function"]["name"] for tool in tools) if name not in ("look", "conclude")]
        if foreign:
            raise CodecError(f"the starter policies have no tokens for the tools {foreign!r}; play without them or seat a chat model")
        return (self._ids["<bos>"], *self._render(messages))

    def extend(self, messages: Sequence[Message], closed: bool = True) -> Ids:
        return (*(() if closed else (self._eos,)), *self._render(messages))

    def force(self, kind: Force) -> Ids:
        return (self._ids[f"<{kind}>"],)

    def parse(self, ids: Sequence[int]) -> Action | ParseFault:
        closed = bool(ids) and ids[-1] == self._eos
        said = ids[:-1] if closed else ids
        parts = self._parts(said)
        text = self.text(said)
        fault = ParseFault(f"expected one look, one conclusion or plain words, got {text!r}.", text)
        if parts is None or not all(parts.values()):
            return fault
        if list(parts) == [""]:
            return Reply(parts[""])
        if not closed:
            return ParseFault("the action was cut off before its end.", text)
        if list(parts) == ["<look>"]:
            return Look(parts["<look>"])
        if "<conclude>" in parts and set(parts) <= {"<conclude>", "<because>"}:
            return Conclude(parts["<conclude>"], parts.get("<because>", ""))
        return fault

    def action_ids(self, action: Action) -> Ids:
        if isinstance(action, ToolUse) or (isinstance(action, Look) and action.region):
            raise CodecError(f"the starter policies have no tokens for {action!r}")
        if isinstance(action, Look):
            said = (*self.force("look"), *self._encode(action.question))
        elif isinstance(action, Conclude):
            because = (self._ids["<because>"], *self._encode(action.explanation)) if action.explanation else ()
            said = (*because, *self.force("conclude"), *self._encode(action.answer))
        else:
            said = self._encode(action.text)
        return (*said, self._eos)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _parts(self, ids: Sequence[int]) -> dict[str, str] | None:
        """The words by the mark before them ("" for none); None where a special token is foreign or comes twice."""
        parts: dict[str, list[int]] = {}
        mark = ""
        for number in ids:
            name = self._names.get(number)
            if name is None:
                parts.setdefault(mark, []).append(number)
            elif name not in MARKS or name in parts:
                return None
            else:
                mark = name
                parts[mark] = []
        return {mark: self.text(said).strip() for mark, said in parts.items()} or None

    def _render(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            if message.role not in OPENERS:
                raise CodecError(f"the starter policies know no {message.role!r} message; leave it out")
            ids.append(self._ids[OPENERS[message.role]])
            if message.action is not None:
                ids += self.action_ids(message.action)
            ids += self._body(message)
        return [*ids, self._ids["<assistant>"]]

    def _body(self, message: Message) -> list[int]:
        ids: list[int] = []
        for picture in message.pictures:
            pads = visual_tokens(self._count, picture)
            ids += [self._ids["<|vision_start|>"], *[self._ids["<|image_pad|>"]] * pads, self._ids["<|vision_end|>"]]
        ids += self._encode(message.text)
        for choice in message.choices:
            ids += [self._ids["<choice>"], *self._encode(choice)]
        return ids

    def _encode_words(self, text: str) -> Ids:
        ids = self._tokenizer.encode(text, add_special_tokens=False) if text else []
        if self._names.keys() & ids:
            unknown = [word for word in text.split() if self._names.keys() & self._tokenizer.encode(word, add_special_tokens=False)]
            raise CodecError(f"the starter policies do not know the words {unknown!r} in {text!r}; use the task's own words")
        return tuple(ids)
