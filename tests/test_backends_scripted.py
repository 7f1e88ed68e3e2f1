"""The scripted engine: replies, exact log-probs, failures."""

from __future__ import annotations

import asyncio
import math

import pytest
from PIL import Image

from monologue.backends.base import (
    Backend,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    Picture,
    Prompt,
    RequestRefused,
    Sampling,
)
from monologue.backends.scripted import Request, ScriptedBackend
from monologue.backends.tokens import ByteTokenizer, tokenizer_hash

TOKENS = ByteTokenizer()
EOS = TOKENS.encode("<eos>")[0]
GREEDY = Sampling(temperature=0, stop_ids=(EOS,))


def prompt(text: str, *pictures: Picture) -> Prompt:
    return Prompt(tuple(TOKENS.encode(text)), pictures)


def picture() -> Picture:
    return Picture("0" * 64, Image.new("RGB", (84, 84), "red"))


@pytest.mark.parametrize("text", ["", "where is the red star ?", "<user> é<eos>☆", "<|image_pad|><|image_pad|>", "<user"])
def test_the_byte_tokenizer_gives_back_any_text(text: str) -> None:
    assert TOKENS.decode(TOKENS.encode(text)) == text


def test_the_tokenizers_hash_depends_on_its_specials_alone() -> None:
    assert tokenizer_hash(ByteTokenizer()) == tokenizer_hash(TOKENS) != tokenizer_hash(ByteTokenizer(("<eos>",)))


async def test_a_list_is_played_in_order_and_then_used_up() -> None:
    engine = ScriptedBackend(["b2", "red"])
    assert isinstance(engine, Backend)
    first, second = [await engine.generate(prompt("hi"), GREEDY) for _ in range(2)]
    assert [TOKENS.decode(reply.ids) for reply in (first, second)] == ["b2<eos>", "red<eos>"]
    assert first.logprobs == (0.0,) * 3 and first.finish_reason == "stop"
    with pytest.raises(BackendError, match="used up"):
        await engine.generate(prompt("hi"), GREEDY)


async def test_a_dict_answers_by_the_key_that_stands_latest_in_the_prompt() -> None:
    engine = ScriptedBackend({"star": "b2", "red star": "c3", "colour": "red"})
    said = [await engine.generate(prompt(text), GREEDY) for text in ("the star", "a red star", "star, its colour ?")]
    assert [TOKENS.decode(reply.ids[:-1]) for reply in said] == ["b2", "c3", "red"]
    with pytest.raises(BackendError, match="scripted keys"):
        await engine.generate(prompt("nothing"), GREEDY)


async def test_a_function_may_be_async_and_sees_text_and_ids() -> None:
    async def echo(request: Request) -> str:
        return request.text.upper()

    engine = ScriptedBackend(echo)
    assert TOKENS.decode((await engine.generate(prompt("abc"), GREEDY)).ids) == "ABC<eos>"
    assert engine.requests[0].prompt == prompt("abc")


async def test_a_lottery_draws_with_the_exact_share_of_its_tickets() -> None:
    engine = ScriptedBackend({"?": {"ab": 1.0, "ac": 2.0, "b": 1.0}})
    for seed in range(20):
        sampling = Sampling(seed=seed, stop_ids=(EOS,))
        reply = await engine.generate(prompt("?"), sampling)
        share = {"ab<eos>": 0.25, "ac<eos>": 0.5, "b<eos>": 0.25}[TOKENS.decode(reply.ids)]
        assert reply.logprobs is not None and math.isclose(sum(reply.logprobs), math.log(share))
        assert await engine.score(prompt("?"), reply.ids, sampling) == reply.logprobs
        assert (await engine.generate(prompt("?"), sampling)).ids == reply.ids


async def test_greedy_takes_the_likeliest_ticket_with_untempered_logprobs() -> None:
    engine = ScriptedBackend({"?": {"ab": 1.0, "ac": 2.0, "b": 1.0}})
    reply = await engine.generate(prompt("?"), GREEDY)
    assert TOKENS.decode(reply.ids) == "ac<eos>"
    assert reply.logprobs == pytest.approx((math.log(3 / 4), math.log(2 / 3), 0.0))


async def test_truncation_leaves_the_rest_renormalised() -> None:
    engine = ScriptedBackend({"?": {"a": 5.0, "b": 3.0, "c": 2.0}})
    (share, _) = await engine.score(prompt("?"), tuple(TOKENS.encode("b<eos>")), Sampling(top_k=2, stop_ids=(EOS,)))
    assert share == pytest.approx(math.log(3 / 8))
    (gone, _) = await engine.score(prompt("?"), tuple(TOKENS.encode("c<eos>")), Sampling(top_p=0.7, stop_ids=(EOS,)))
    assert gone == -math.inf


async def test_max_tokens_cuts_and_says_length() -> None:
    reply = await ScriptedBackend(["abcdef"]).generate(prompt("x"), Sampling(max_tokens=2, stop_ids=(EOS,)))
    assert TOKENS.decode(reply.ids) == "ab" and reply.finish_reason == "length"


async def test_failures_are_raised_where_the_script_puts_them() -> None:
    engine = ScriptedBackend([BackendTimeout("too slow"), "ok"])
    with pytest.raises(BackendTimeout, match="too slow"):
        await engine.generate(prompt("x"), GREEDY)
    assert (await engine.generate(prompt("x"), GREEDY)).finish_reason == "stop"


async def test_a_late_reply_is_a_timeout() -> None:
    async def never(request: Request) -> str:
        await asyncio.Event().wait()
        return ""

    with pytest.raises(BackendTimeout):
        await ScriptedBackend(never, timeout=0.01).generate(prompt("x"), GREEDY)


async def test_pictures_are_placed_or_refused() -> None:
    engine = ScriptedBackend({"?": "b2"})
    room = engine.placeholders(picture().image)
    assert room.count == 9
    reply = await engine.generate(prompt("<user>" + "<|image_pad|>" * 9 + "?", picture()), GREEDY)
    assert (reply.images[0].placeholder_start, reply.images[0].placeholder_count, reply.images[0].grid) == (1, 9, (1, 6, 6))
    for wrong in (prompt("<|image_pad|>" * 8 + "?", picture()), prompt("<|image_pad|>?"), prompt("?", picture())):
        with pytest.raises(RequestRefused):
            await engine.generate(wrong, GREEDY)
    with pytest.raises(RequestRefused, match="sees=False"):
        await ScriptedBackend(["x"], sees=False).generate(prompt("?", picture()), GREEDY)


async def test_a_version_travels_with_later_replies_and_a_closed_engine_is_unavailable() -> None:
    engine = ScriptedBackend(["a", "b"])
    await engine.load("anywhere", "7")
    assert (await engine.generate(prompt("x"), GREEDY)).weights_version == "7" == engine.facts.weights_version
    await engine.aclose()
    with pytest.raises(BackendUnavailable):
        await engine.generate(prompt("x"), GREEDY)


async def test_any_object_with_encode_and_decode_will_do() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    reply = await ScriptedBackend(["hi"], Letters()).generate(Prompt((65,)), Sampling())  # type: ignore[arg-type]
    assert reply.ids == (104, 105) and reply.finish_reason == "stop"
