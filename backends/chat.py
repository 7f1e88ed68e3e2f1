"""Any LangChain chat model as an engine: words in, words out, and so never a log-probability.

Hosted models and teachers speak a chat interface that hides their tokens. What they said is put into the ids of a codec (``encode``, which
``monologue.agents.hosted`` hands in), exactly as an oracle's lines are: good to imitate, useless for a policy gradient, which needs the
tokens that were sampled and their probabilities. Log-probs are None, and training says so.

    timeout                                    BackendTimeout; the deadline is of the call, all attempts included
    no connection; 408, 429, 5xx               BackendUnavailable, tried again with growing, jittered waits
    any other 4xx; no tools                    RequestRefused
    anything else                              BackendError

Every SDK has exceptions of its own; what they share is read off them: a status code, or a cause that is a lost connection. How the
model is sampled (temperature, length, seed) is set on the model, whose classes have no common names for it: another ``Sampling`` than the
default is refused, and the trace holds no temperature. All models run on one event loop in a background thread, since their SDKs keep
connections that belong to the loop which first used them. Left out: streaming, and the words that some models say beside a call.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from monologue.backends.base import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    Facts,
    Generation,
    Prompt,
    RequestRefused,
    Sampling,
    Spoken,
)
from monologue.backends.pictures import Eyes, Placeholders, locate
from monologue.backends.wire import FIRST_WAIT, LONGEST_WAIT, Loop
from monologue.traces.png import png_bytes

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, BaseMessage


@dataclass(frozen=True, slots=True)
class Said:
    """A reply as it came."""

    text: str
    """Words, beside calls or alone."""
    calls: tuple[tuple[str, Mapping[str, Any] | str], ...] = ()
    """Name and arguments of each call; text where the arguments are no JSON object."""
    cut: bool = False
    """The reply ended at its length limit."""


class ChatBackend:
    """Plays one policy on one model, which stays the caller's."""

    def __init__(
        self,
        model: BaseChatModel,
        encode: Callable[[Said, Prompt], tuple[int, ...]],
        eyes: Eyes,
        *,
        tokenizer_hash: str,
        template_hash: str,
        brief: Callable[[Spoken], str] = lambda spoken: "",
        timeout: float = 120.0,
        attempts: int = 4,
    ) -> None:
        """``encode`` gives the ids of a reply and ``eyes`` the room of a picture, both in the codec of the two hashes. ``brief`` is said as
        the system message of a dialogue that has none; ``timeout`` is the deadline of a call in seconds, all attempts included.
        """
        if timeout <= 0 or attempts < 1:
            raise ValueError(f"expected a timeout above 0 s and at least 1 attempt, got {timeout!r} and {attempts!r}")
        self._model, self._encode, self._eyes, self._brief = model, encode, eyes, brief
        self._timeout, self._attempts = timeout, attempts
        name = str(getattr(model, "model_name", None) or getattr(model, "model", None) or type(model).__name__)
        extra = {"client": type(model).__name__, "image_token_id": eyes.image_token_id, "processor_hash": eyes.processor_hash}
        engine = version("langchain-core")
        self.facts = Facts(name, "chat", engine, name, tokenizer_hash, template_hash, True, 1 << 20, logprobs=False, extra=extra)

    @property
    def image_token_id(self) -> int | None:
        return self._eyes.image_token_id

    @property
    def processor_hash(self) -> str:
        return self._eyes.processor_hash

    def placeholders(self, image: Image) -> Placeholders:
        """The room a picture takes in the recorded prompt."""
        return self._eyes.placeholders(image)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """Asks the model. Raises BackendError; what ``encode`` raises where the reply cannot be put into ids."""
        if prompt.spoken is None:
            raise RequestRefused("expected a prompt that says its words too (Prompt.spoken), got ids alone; a chat model reads no ids")
        if replace(sampling, seed=None, stop_ids=()) != Sampling():
            raise RequestRefused(
                f"set temperature and length on the chat model itself, whose classes name them differently; got {sampling!r}"
            )
        rooms = tuple(self.placeholders(picture.image) for picture in prompt.pictures)
        images = locate(prompt, rooms, self.image_token_id, self.processor_hash) if rooms else ()
        started = time.perf_counter()
        reply = await _loop().run(self._ask(prompt.spoken))
        said = _said(reply)
        return Generation(
            ids=self._encode(said, prompt),
            logprobs=None,
            finish_reason="length" if said.cut else "stop",
            weights_version=str(reply.response_metadata.get("model_name") or self.facts.weights_version),
            images=images,
            seconds=time.perf_counter() - started,
            reported=(usage["input_tokens"], usage["output_tokens"]) if (usage := reply.usage_metadata) else None,
        )

    async def score(self, prompt: Prompt, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
        raise RequestRefused(
            f"{self.facts.model!r} is reached by a chat interface, which returns text only: it has no log-probs to score with"
        )

    async def load(self, weights: str, version: str) -> None:
        raise RequestRefused(f"{self.facts.model!r} is hosted by somebody else: its weights cannot be set from here")

    async def aclose(self) -> None:
        """Nothing of its own is open."""

    async def _ask(self, spoken: Spoken) -> AIMessage:
        messages, ends = self._messages(spoken), time.monotonic() + self._timeout
        name = f"{self.facts.model!r} (a dialogue of {len(messages)} messages)"
        model = self._bound(spoken)
        for attempt in range(1, self._attempts + 1):
            try:
                return await asyncio.wait_for(model.ainvoke(messages), ends - time.monotonic())
            except Exception as error:
                failure = _failure(error, name, attempt)
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                if attempt == self._attempts or not isinstance(failure, BackendUnavailable) or time.monotonic() + wait >= ends:
                    raise failure from error
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def _bound(self, spoken: Spoken) -> Any:
        if not spoken.tools:
            return self._model
        try:
            return self._model.bind_tools([dict(tool) for tool in spoken.tools], **({"tool_choice": spoken.force} if spoken.force else {}))
        except NotImplementedError as error:
            raise RequestRefused(f"{self.facts.model!r} takes no tools; seat it where words suffice, as the answerer") from error

    def _messages(self, spoken: Spoken) -> list[BaseMessage]:
        from langchain_core.messages import SystemMessage, convert_to_messages

        said = convert_to_messages([{**turn, "content": _content(turn["content"])} for turn in spoken.turns])
        brief = "" if any(turn["role"] == "system" for turn in spoken.turns) else self._brief(spoken)
        return [SystemMessage(brief), *said] if brief else said


@lru_cache(maxsize=1)
def _loop() -> Loop:
    return Loop("chat models")


def _content(content: str | Sequence[Mapping[str, Any]]) -> Any:
    """Pictures as data URIs of PNG files, the form that every provider's class understands."""
    if isinstance(content, str):
        return content
    return [{"type": "image_url", "image_url": {"url": _uri(part["picture"].image)}} if "picture" in part else part for part in content]


def _uri(image: Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def _said(reply: AIMessage) -> Said:
    calls: list[tuple[str, Mapping[str, Any] | str]] = [(call["name"], call["args"]) for call in reply.tool_calls]
    calls += [(call["name"] or "", call["args"] or "") for call in reply.invalid_tool_calls]
    facts = reply.response_metadata
    cut = (facts.get("finish_reason") or facts.get("stop_reason")) in ("length", "max_tokens", "MAX_TOKENS")
    return Said(str(reply.text).strip(), tuple(calls), cut)


def _failure(error: Exception, asked: str, attempt: int) -> BackendError:
    """What an SDK's exception means to us."""
    told = f"{asked}, attempt {attempt}: {type(error).__name__}: {str(error)[:300]}"
    causes = tuple(_causes(error))
    codes = (getattr(one, name, None) for one in causes for name in ("status_code", "code"))
    status = next((code for code in codes if isinstance(code, int)), None)
    if status in (408, 429) or (status or 0) >= 500:
        return BackendUnavailable(f"the chat model cannot answer now: {told}")
    if status is not None and status >= 400:
        return RequestRefused(f"the chat model refuses the request: {told}")
    if any("Timeout" in type(one).__name__ for one in causes):
        return BackendTimeout(f"no answer in time from the chat model {told}")
    lost = ("TransportError", "APIConnectionError")
    if any(isinstance(one, OSError) or any(kind.__name__ in lost for kind in type(one).__mro__) for one in causes):
        return BackendUnavailable(f"the chat model cannot be reached: {told}")
    return BackendError(f"the chat model failed: {told}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
