"""ChatCodec: any Hugging Face chat template, actions as ``<tool_call>{json}</tool_call>`` (the hermes form that Qwen speaks).

The template is used twice and never on a whole dialogue. ``open`` renders the first messages. ``extend`` renders the new
messages after a stand-in exchange and keeps what the template puts behind the stand-in's stop token; that this does not
depend on the stand-in is checked once, when the codec is made, so a template that rewrites earlier turns is refused before it
can break a stream. (Rendering the dialogue anew instead would re-encode sampled text, and templates that drop earlier
thinking would change the prefix.)

What a template cannot say is found out at the start too, and said in words it can: tools are explained in the system message
where the template does not know them, tool results come as user messages where it knows no tool role. Text from outside is
disarmed first: the name of a special token in it gets a space, so a reply cannot end a turn or forge a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from monologue.agents.codec import CodecError, Force, Ids, Schema, VisualTokens, visual_tokens
from monologue.agents.messages import Action, Conclude, Look, Message, ParseFault, Reply, ToolUse, plain
from monologue.agents.prompts import CHAT, HERMES, Wording
from monologue.agents.spoken import with_choices
from monologue.backends.base import Picture
from monologue.backends.tokens import template_hash, tokenizer_hash

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
THOUGHT = re.compile(r"^.*?</think>", re.DOTALL)
STANDINS = ("stand-in zulu", "stand-in quebec")
PROBES = ("red", "Blue", "so?", "so.", "7", "a)", '"b"', "a line\n")
"""Ends of what may be said; tokenizers merge some of them with what follows."""


class ChatCodec:
    """Serves every model whose tokenizer has a chat template."""

    def __init__(self, tokenizer: Any, visual_tokens: VisualTokens = None, image_token: str | None = None, wording: Wording = CHAT) -> None:
        """``visual_tokens`` counts the placeholders of a picture; ``image_token`` is the placeholder that the template writes
        once.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise CodecError("the tokenizer has no chat template; ChatCodec needs one")
        if tokenizer.eos_token_id is None:
            raise CodecError("the tokenizer names no end-of-sequence token; set tokenizer.eos_token to the token that ends a turn")
        self.wording = wording
        self._tokenizer = tokenizer
        self._count = visual_tokens
        self._image_id = None if image_token is None else int(tokenizer.convert_tokens_to_ids(image_token))
        self._stop = str(tokenizer.eos_token)
        self.stop_ids: Ids = (int(tokenizer.eos_token_id),)
        names = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
        self._forged = re.compile("|".join(map(re.escape, sorted({n for n in names if len(n) > 2}, key=len, reverse=True))) or r"(?!)")
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.template_hash = template_hash(tokenizer.chat_template)
        asked = {"role": "user", "content": self._content("x")}
        self._explains_tools = "probe_zulu" in self._try([asked], tools=[_PROBE])
        heard = self._try([asked, _call("x"), {**asked, "role": "tool", "content": self._content(STANDINS[0])}])
        self._hears_tools = self._explains_tools and STANDINS[0] in heard
        for role in ("user", "tool"):
            self._behind([Message(role, "x")])

    @property
    def ending(self) -> Ids:
        prompts = [self.open([Message("user", said)])[::-1] for said in PROBES]
        alike = [len(set(ids)) == 1 for ids in zip(*prompts, strict=False)]
        common = prompts[0][: [*alike, False].index(False)][::-1]
        if not set(common) & {*self._tokenizer.all_special_ids, *self._tokenizer.get_added_vocab().values()}:
            raise CodecError(
                f"expected a chat template whose prompts all end with a token that is no text, such as <|im_start|>, "
                f"got {self.text(common)!r} as their common end, which a reply may hold too"
            )
        return common

    def open(self, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> Ids:
        said = [self._plain(message) for message in messages if message.text or message.pictures or message.action]
        if tools and not self._explains_tools:
            explained = HERMES.format(tools="\n".join(json.dumps(tool) for tool in tools))
            said = _with_system(said, explained, self._content)
        text = self._render(said, tools=list(tools) if self._explains_tools and tools else None)
        return self._expand(self._encode(text), messages)

    def extend(self, messages: Sequence[Message], closed: bool = True) -> Ids:
        text = ("" if closed else self._stop) + self._behind(messages)
        return self._expand(self._encode(text), messages)

    def force(self, kind: Force) -> Ids:
        return self._encode(_call_head(kind))

    def parse(self, ids: Sequence[int]) -> Action | ParseFault:
        closed = bool(ids) and ids[-1] in self.stop_ids
        text = self.text(ids[:-1] if closed else ids)
        spoken = THOUGHT.sub("", text).strip()
        calls = CALL.findall(spoken)
        if len(calls) > 1:
            return ParseFault(f"one call was expected, {len(calls)} came.", text)
        if calls:
            return _read_call(calls[0], text)
        if "<tool_call>" in spoken or "<think>" in spoken:
            return ParseFault("the call or thought was cut off before its end.", text)
        return Reply(spoken) if spoken else ParseFault("nothing was said.", text)

    def action_ids(self, action: Action) -> Ids:
        if isinstance(action, Reply):
            return (*self._encode(self._disarmed(action.text)), *self.stop_ids)
        if isinstance(action, ToolUse):
            head, arguments = self._encode(_call_head(action.name)), action.arguments
        else:
            arguments = plain(action)
            head = self.force(arguments.pop("kind"))
        return (*head, *self._encode(f" {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>"), *self.stop_ids)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, text: str) -> Ids:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _disarmed(self, text: str) -> str:
        return self._forged.sub(lambda found: found[0][0] + " " + found[0][1:], text)

    def _content(self, text: str, pictures: Sequence[Picture] = ()) -> Any:
        """A list of parts where the model sees, since some templates take nothing else; else a string, for the same reason."""
        if self._image_id is None:
            if pictures:
                raise CodecError("a picture was shown to a policy that does not see; seat a policy with an image processor there")
            return text
        return [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]

    def _plain(self, message: Message) -> dict[str, Any]:
        if isinstance(message.action, Reply):
            return {"role": message.role, "content": self._content(self._disarmed(message.action.text))}
        if message.action is not None:
            said = plain(message.action)
            name = message.action.name if isinstance(message.action, ToolUse) else said.pop("kind")
            return _call(name, message.action.arguments if isinstance(message.action, ToolUse) else said)
        text = with_choices(message)
        role = "user" if message.role == "tool" and not self._hears_tools else message.role
        return {"role": role, "content": self._content(self._disarmed(text), message.pictures)}

    def _behind(self, messages: Sequence[Message]) -> str:
        """What the template puts between an assistant's stop token and the next generation; the same whatever was said
        before.
        """
        said = [self._plain(message) for message in messages]
        found = {self._after(standin, said) for standin in STANDINS}
        if len(found) != 1:
            raise CodecError("the chat template renders new messages differently after different replies, so streams cannot grow verbatim")
        return found.pop()

    def _after(self, standin: str, said: list[dict[str, Any]]) -> str:
        call = _call(standin) if said[0]["role"] == "tool" else {}
        spoken = {**call, "role": "assistant", "content": self._content(standin)}
        text = self._render([{"role": "user", "content": self._content("x")}, spoken, *said])
        _, mark, tail = text.partition(standin)
        _, stop, behind = tail.partition(self._stop)
        if not mark or not stop:
            raise CodecError(f"the chat template does not show a reply that ends with {self._stop!r}, so streams cannot grow verbatim")
        return behind

    def _render(self, said: list[dict[str, Any]], tools: list[Schema] | None = None) -> str:
        return str(self._tokenizer.apply_chat_template(said, tools=tools, add_generation_prompt=True, tokenize=False))

    def _try(self, said: list[dict[str, Any]], tools: list[Schema] | None = None) -> str:
        """A rendering that the template may refuse: what it refuses, it does not know."""
        try:
            return self._render(said, tools)
        except Exception as refusal:
            from jinja2.exceptions import TemplateError  # whoever has a template to fail has jinja2; hosted models have neither

            if not isinstance(refusal, TemplateError):
                raise
            return ""

    def _expand(self, ids: Ids, messages: Sequence[Message]) -> Ids:
        """Each picture's single placeholder, repeated to the number of its visual tokens."""
        pictures = [picture for message in messages for picture in message.pictures]
        if self._image_id is None:
            return ids
        if ids.count(self._image_id) != len(pictures):
            raise CodecError(f"the chat template wrote {ids.count(self._image_id)} picture placeholders for {len(pictures)} pictures")
        counts = iter([visual_tokens(self._count, picture) for picture in pictures])
        return tuple(copy for number in ids for copy in ([number] * next(counts) if number == self._image_id else [number]))


_PROBE: Schema = {
    "type": "function",
    "function": {"name": "probe_zulu", "description": "x", "parameters": {"type": "object", "properties": {}}},
}


def _call_head(name: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments":'


def _call(name: str, arguments: Any = None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _with_system(said: list[dict[str, Any]], text: str, content: Any) -> list[dict[str, Any]]:
    """The text appended to the system message, or as a new one."""
    if said and said[0]["role"] == "system":
        old = said[0]["content"]
        old = old if isinstance(old, str) else old[-1]["text"]
        return [{"role": "system", "content": content(f"{old}\n\n{text}")}, *said[1:]]
    return [{"role": "system", "content": content(text)}, *said]


def _read_call(call: str, text: str) -> Action | ParseFault:
    try:
        read = json.loads(call)
        name, arguments = read["name"], read["arguments"]
    except (ValueError, KeyError, TypeError):
        return ParseFault(f'a call is JSON with "name" and "arguments", got {call!r}.', text)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return ParseFault(f"name must be a string and arguments an object, got {call!r}.", text)
    return read_call(name, arguments, text)


def read_call(name: str, arguments: dict[str, Any], text: str) -> Action | ParseFault:
    """The action that a call makes, or what is wrong with it; ``text`` is the reply that it stands in."""
    if name == "look":
        return _look(arguments, text)
    if name == "conclude":
        answer, why = arguments.get("answer"), arguments.get("explanation", "")
        if isinstance(answer, str) and answer.strip() and isinstance(why, str) and set(arguments) <= {"answer", "explanation"}:
            return Conclude(answer, why)
        return ParseFault(f"conclude needs an answer in words, got {arguments!r}.", text)
    return ToolUse(name, arguments)


def _look(arguments: dict[str, Any], text: str) -> Action | ParseFault:
    question, region = arguments.get("question"), arguments.get("region")
    if not isinstance(question, str) or not question.strip() or not set(arguments) <= {"question", "region"}:
        return ParseFault(f"look needs a question in words, got {arguments!r}.", text)
    if region is None:
        return Look(question)
    numbers = isinstance(region, list) and len(region) == 4 and all(type(edge) in (int, float) for edge in region)
    if not numbers or not (0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1):
        return ParseFault(f"a region is [left, top, right, bottom] as fractions from 0 to 1, got {region!r}.", text)
    return Look(question, (float(region[0]), float(region[1]), float(region[2]), float(region[3])))
