"""The in-process engine on tiny random checkpoints: alone equals batched, log-probs equal a plain forward, ends are as told."""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from monologue.backends.base import (
    Backend,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    Generation,
    Picture,
    Prompt,
    RequestRefused,
    Sampling,
)
from monologue.backends.decoding import Decoder, Lane
from monologue.backends.hf import HFBackend
from monologue.backends.inputs import Inputs
from monologue.backends.latent import Habit
from monologue.backends.perception.modes import Mode
from monologue.backends.places import fingerprint
from monologue.backends.tokens import template_hash
from tests import tiny_models as tiny

FAMILIES = ["text", "qwen2", "qwen2_5"]
SAMPLED = Sampling(temperature=1.3, max_tokens=12, stop_ids=(tiny.EOS,))
GREEDY = replace(SAMPLED, temperature=0)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "text": tiny.save_text_model(root / "text"),
        "other": tiny.save_text_model(root / "other", seed=1),
        **{family: tiny.save_vision_model(root / family, family) for family in ("qwen2", "qwen2_5")},
    }


@pytest.fixture(scope="session")
def engines(checkpoints: dict[str, Path]) -> dict[str, HFBackend]:
    return {family: HFBackend(checkpoints[family]) for family in FAMILIES}


@pytest.fixture
async def own(checkpoints: dict[str, Path]) -> AsyncIterator[HFBackend]:
    """A text engine that a test may close, load or burden as it likes."""
    engine = HFBackend(checkpoints["text"], window=0.1)
    yield engine
    await engine.aclose()


class Gate:
    """Holds an engine's second decode step until it is opened, and counts steps."""

    def __init__(self, engine: HFBackend) -> None:
        self.open, self._there = threading.Event(), threading.Event()
        self.steps = self.most = 0
        step = engine._decoder._step

        def wait(batch: Any) -> None:
            self.steps, self.most = self.steps + 1, max(self.most, len(batch.lanes))
            self._there.set()
            self.open.wait()
            step(batch)

        engine._decoder._step = wait  # type: ignore[method-assign]

    async def reached(self) -> None:
        await asyncio.to_thread(self._there.wait)


def picture(width: int, height: int, seed: int) -> Picture:
    noise = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Picture(f"{seed:064x}", Image.fromarray(noise))


def words(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(len(tiny.SPECIALS), tiny.SIZE), k=count))


def shown(engine: HFBackend, ids: tuple[int, ...], *pictures: Picture) -> Prompt:
    """Two words, each picture, the other words."""
    seen: list[int] = []
    for one in pictures:
        seen += [tiny.START, *[tiny.IMAGE] * engine.placeholders(one.image).count, tiny.END]
    return Prompt((*ids[:2], *seen, *ids[2:]), pictures)


def ragged(engine: HFBackend) -> list[Prompt]:
    """Prompts of many lengths; with pictures of several grids where the engine sees, and some without."""
    texts = [Prompt(words(count, count)) for count in (1, 3, 9, 20)]
    if not engine.facts.sees:
        return texts
    small, wide, tall = picture(28, 28, 1), picture(112, 56, 2), picture(60, 110, 3)
    return [
        *texts,
        shown(engine, words(5, 5), small),
        shown(engine, words(4, 6), wide),
        shown(engine, words(7, 7), tall, small),
    ]


def reference(engine: HFBackend, prompt: Prompt, ids: tuple[int, ...], temperature: float) -> list[float]:
    """Log-probs by one plain forward of the Hugging Face model, unpadded, positions left to the model."""
    model: Any = engine._model
    tokens = torch.tensor([[*prompt.ids, *ids]])
    extra: dict[str, Any] = {}
    if prompt.pictures:
        pixels = engine._inputs._processor(images=[one.image for one in prompt.pictures], return_tensors="pt")
        extra = {**pixels, "mm_token_type_ids": (tokens == tiny.IMAGE).int()}
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **extra).logits[0].double()
    logits[:, engine.facts.extra["banned_ids"]] = -math.inf
    log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
    return [float(log_probs[len(prompt.ids) - 1 + place, token]) for place, token in enumerate(ids)]


async def together(engine: HFBackend, prompts: list[Prompt], sampling: Sampling) -> list[Generation]:
    return await asyncio.gather(*[engine.generate(prompt, replace(sampling, seed=seed)) for seed, prompt in enumerate(prompts)])


@pytest.mark.parametrize("family", FAMILIES)
async def test_prompts_that_are_alike_are_read_once_and_each_has_its_own_reply(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    engine = HFBackend(checkpoints[family], window=0.1)
    prompts = [prompt for prompt in ragged(engine) for _ in range(3)]
    alone = [await engine.generate(prompt, replace(SAMPLED, seed=seed)) for seed, prompt in enumerate(prompts)]
    read: list[int] = []
    forward = Decoder._forward

    def counted(self: Decoder, lanes: list[Lane], **options: Any) -> Any:
        read.append(len(lanes))
        return forward(self, lanes, **options)

    prepared: list[int] = []
    pixels = Inputs.pixels

    def noted(self: Inputs, images: Sequence[Image.Image]) -> Any:
        prepared.append(len(images))
        return pixels(self, images)

    monkeypatch.setattr(Decoder, "_forward", counted)
    monkeypatch.setattr(Inputs, "pixels", noted)
    found = await together(engine, prompts, SAMPLED)
    await engine.aclose()
    assert read == [len(prompts) // 3]
    assert prepared == [len(prompt.pictures) for prompt in prompts[::3] if prompt.pictures]
    assert [one.ids for one in found] == [one.ids for one in alone]
    assert len({one.ids for one in found}) > len(prompts) // 3
    for one, other in zip(found, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


async def test_pictures_of_equal_bytes_and_other_palettes_are_two(engines: dict[str, HFBackend]) -> None:
    engine = engines["qwen2"]
    black, white = Image.new("P", (56, 56)), Image.new("P", (56, 56))
    black.putpalette([0, 0, 0]), white.putpalette([255, 255, 255])
    assert black.tobytes() == white.tobytes()
    count = engine.placeholders(black).count
    prompts = [Prompt((7, *[tiny.IMAGE] * count, 8), (Picture("same", image),)) for image in (black, white)]
    for prompt, reply in zip(prompts, await together(engine, prompts, GREEDY), strict=True):
        assert reply.logprobs == pytest.approx(reference(engine, prompt, reply.ids, 0), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, top_p=0.7, top_k=9)], ids=["greedy", "sampled", "truncated"])
async def test_a_batch_says_token_for_token_what_each_prompt_says_alone(
    engines: dict[str, HFBackend], family: str, sampling: Sampling
) -> None:
    engine = engines[family]
    prompts = ragged(engine) * 3
    batched = await together(engine, prompts, sampling)
    assert len({reply.ids for reply in batched}) > 3
    for seed, (prompt, reply) in enumerate(zip(prompts, batched, strict=True)):
        alone = await engine.generate(prompt, replace(sampling, seed=seed))
        assert alone.ids == reply.ids and alone.finish_reason == reply.finish_reason
        assert alone.logprobs == pytest.approx(reply.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_logprobs_are_those_of_a_plain_forward(engines: dict[str, HFBackend], family: str, sampling: Sampling) -> None:
    engine = engines[family]
    prompts = ragged(engine)
    for prompt, reply in zip(prompts, await together(engine, prompts, sampling), strict=True):
        assert reply.logprobs == pytest.approx(reference(engine, prompt, reply.ids, sampling.temperature), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, top_p=0.7, top_k=9)], ids=["greedy", "sampled", "truncated"])
async def test_score_gives_the_logprobs_of_generate(engines: dict[str, HFBackend], family: str, sampling: Sampling) -> None:
    engine = engines[family]
    prompts = ragged(engine)
    replies = await together(engine, prompts, sampling)
    scores = await asyncio.gather(*[engine.score(prompt, reply.ids, sampling) for prompt, reply in zip(prompts, replies, strict=True)])
    for reply, score in zip(replies, scores, strict=True):
        assert score == pytest.approx(reply.logprobs, abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, replace(SAMPLED, top_p=0.7, top_k=9)], ids=["greedy", "truncated"])
async def test_entropies_are_those_of_the_distribution_that_was_sampled(engines: dict[str, HFBackend], sampling: Sampling) -> None:
    engine, prompt = engines["qwen2"], Prompt(words(9, 9))
    first = await engine.generate(prompt, replace(sampling, max_tokens=1, seed=3))
    sayable = [token for token in range(engine.facts.extra["vocabulary"]) if token not in engine.facts.extra["banned_ids"]]
    scores = await asyncio.gather(*[engine.score(prompt, (token,), sampling) for token in sayable])
    entropy = -math.fsum(math.exp(score) * score for (score,) in scores if score > -math.inf)
    assert first.entropies == pytest.approx((entropy,), abs=1e-4) and entropy > 0


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5"])
async def test_another_picture_changes_the_logprobs(engines: dict[str, HFBackend], family: str) -> None:
    engine = engines[family]
    prompts = [shown(engine, words(5, 5), picture(56, 56, seed)) for seed in (1, 2)]
    ids = words(4, 9)
    one, other = [await engine.score(prompt, ids, SAMPLED) for prompt in prompts]
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-3


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5"])
async def test_a_generation_says_where_its_pictures_sit(engines: dict[str, HFBackend], family: str) -> None:
    engine = engines[family]
    wide = picture(112, 56, 2)
    prompt = shown(engine, words(4, 6), wide)
    (facts,) = (await engine.generate(prompt, GREEDY)).images
    assert (facts.sha256, facts.grid, facts.placeholder_start, facts.placeholder_count) == (wide.sha256, (1, 4, 8), 3, 8)
    assert facts.processor_hash == engine.processor_hash


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5"])
async def test_placeholders_are_never_sampled(engines: dict[str, HFBackend], family: str) -> None:
    engine = engines[family]
    hot = Sampling(temperature=1000.0, max_tokens=60)
    replies = await together(engine, [Prompt(words(2, 2))] * 8, hot)
    said = {token for reply in replies for token in reply.ids}
    assert len(said) == tiny.SIZE - 2 and not said & {tiny.IMAGE, tiny.VIDEO}


async def test_a_seed_fixes_the_tokens_and_no_seed_draws_a_fresh_one(engines: dict[str, HFBackend]) -> None:
    prompt, engine = Prompt(words(4, 4)), engines["text"]
    same = await asyncio.gather(*[engine.generate(prompt, replace(SAMPLED, seed=5)) for _ in range(3)])
    assert len({reply.ids for reply in same}) == 1
    fresh = await asyncio.gather(*[engine.generate(prompt, SAMPLED) for _ in range(8)])
    assert len({reply.ids for reply in fresh}) > 1 and len({reply.seed for reply in fresh}) == 8
    again = await engine.generate(prompt, replace(SAMPLED, seed=fresh[0].seed))
    assert again.ids == fresh[0].ids


async def test_a_stop_id_is_kept_as_the_last_id_and_max_tokens_cuts(engines: dict[str, HFBackend]) -> None:
    engine, prompt = engines["text"], Prompt(words(4, 4))
    free = await engine.generate(prompt, Sampling(temperature=1.3, max_tokens=9, seed=3))
    assert len(free.ids) == 9 and free.finish_reason == "length"
    stop = free.ids[4]
    cut = await engine.generate(prompt, Sampling(temperature=1.3, max_tokens=9, seed=3, stop_ids=(stop,)))
    assert cut.ids == free.ids[: free.ids.index(stop) + 1] and cut.finish_reason == "stop"


async def test_a_reply_ends_where_the_context_ends(engines: dict[str, HFBackend]) -> None:
    reply = await engines["text"].generate(Prompt(words(tiny.CONTEXT - 3, 1)), Sampling(max_tokens=50))
    assert len(reply.ids) == 3 and reply.finish_reason == "length"


async def test_a_short_reply_is_there_before_the_long_one_of_its_batch(own: HFBackend) -> None:
    order: list[int] = []

    async def say(count: int) -> None:
        await own.generate(Prompt(words(3, count)), Sampling(max_tokens=count))
        order.append(count)

    await asyncio.gather(say(80), say(1), say(20))
    assert order == [1, 20, 80]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt(()), "at least one"),
        (Prompt((6,) * tiny.CONTEXT), "within 96"),
        (Prompt((6, tiny.SIZE)), "ids from 0 to 39"),
        (Prompt((6, -1)), "ids from 0 to 39"),
        (Prompt((6, tiny.IMAGE)), "image placeholders"),
        (Prompt((6, tiny.VIDEO)), "video"),
        (Prompt((6,), (picture(28, 28, 1),)), "image placeholders"),
        (Prompt((6, tiny.IMAGE, 6), (picture(56, 28, 1),)), "image placeholders"),
        (Prompt((tiny.IMAGE, 6, tiny.IMAGE), (picture(56, 28, 1),)), "adjacent"),
        (Prompt((tiny.IMAGE, tiny.IMAGE), (picture(28, 28, 1), picture(28, 28, 2))), "between two pictures"),
        (Prompt((tiny.IMAGE, 6), (picture(5000, 5, 1),)), "(5000, 5) pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_can_never_succeed_is_refused_alone(engines: dict[str, HFBackend], prompt: Prompt, reason: str) -> None:
    engine = engines["qwen2"]
    good, bad = await asyncio.gather(engine.generate(Prompt(words(4, 4)), GREEDY), engine.generate(prompt, GREEDY), return_exceptions=True)
    assert isinstance(good, Generation)
    assert isinstance(bad, RequestRefused) and reason in str(bad)


async def test_pictures_under_one_name_are_not_taken_for_one_another(checkpoints: dict[str, Path]) -> None:
    engine = HFBackend(checkpoints["qwen2"], window=0.1)
    prompts = [shown(engine, words(5, 5), Picture("", picture(56, 56, seed).image)) for seed in (1, 2)]
    alone = [await engine.generate(prompt, GREEDY) for prompt in prompts]
    both = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in prompts))
    await engine.aclose()
    assert prompts[0].ids == prompts[1].ids and alone[0].logprobs != alone[1].logprobs
    for one, other in zip(both, alone, strict=True):
        assert one.ids == other.ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


async def test_a_prompt_that_cannot_be_thought_about_fails_alone_and_thoughts_count_against_the_context(
    checkpoints: dict[str, Path],
) -> None:
    engine = HFBackend(checkpoints["qwen2"], window=0.1, habit=Habit(Mode(k=3, scarce="refuse"), 2))
    seen, scarce = (shown(engine, words(4, 1), picture(*size, 1)) for size in ((84, 84), (56, 56)))
    right, wrong = await asyncio.gather(engine.generate(seen, GREEDY), engine.generate(scarce, GREEDY), return_exceptions=True)
    assert isinstance(right, Generation) and [len(one.chosen) for one in right.thoughts] == [3, 3]
    assert isinstance(wrong, RequestRefused) and "6 patches" in str(wrong)
    long = replace(seen, ids=(*seen.ids, *[9] * (tiny.CONTEXT - len(seen.ids) - 8 - 1)))
    assert len((await engine.generate(long, replace(GREEDY, stop_ids=()))).ids) == 1
    with pytest.raises(RequestRefused, match="and 8 for thoughts"):
        await engine.generate(replace(long, ids=(*long.ids, 9)), GREEDY)
    await engine.aclose()


async def test_a_text_model_refuses_pictures_and_score_refuses_what_cannot_be_said(engines: dict[str, HFBackend]) -> None:
    with pytest.raises(RequestRefused, match="text-only"):
        await engines["text"].generate(Prompt((6,), (picture(28, 28, 1),)), GREEDY)
    with pytest.raises(RequestRefused, match="can sample"):
        await engines["qwen2"].score(Prompt((6,)), (tiny.IMAGE,), GREEDY)
    assert await engines["text"].score(Prompt((6,)), (), GREEDY) == ()


async def test_a_cancelled_call_leaves_its_batch_and_its_neighbours_do_not_notice(own: HFBackend) -> None:
    gate = Gate(own)
    long = asyncio.create_task(own.generate(Prompt(words(30, 3)), Sampling(max_tokens=60)))
    neighbour = asyncio.create_task(own.generate(Prompt(words(4, 4)), replace(SAMPLED, seed=1)))
    await gate.reached()
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    gate.open.set()
    alone = await own.generate(Prompt(words(4, 4)), replace(SAMPLED, seed=1))
    assert len(alone.ids) > 1 and (await neighbour).ids == alone.ids
    assert gate.most == 2 and gate.steps < 30


async def test_a_late_answer_is_a_timeout_and_the_engine_goes_on(own: HFBackend) -> None:
    gate, own._batcher._timeout = Gate(own), 0.05
    with pytest.raises(BackendTimeout, match="no answer within"):
        await own.generate(Prompt(words(3, 3)), Sampling(max_tokens=90))
    gate.open.set()
    own._batcher._timeout = None
    assert len((await own.generate(Prompt(words(3, 3)), Sampling(max_tokens=2))).ids) == 2


async def test_closing_turns_away_what_runs_and_what_comes(own: HFBackend) -> None:
    gate = Gate(own)
    running = asyncio.create_task(own.generate(Prompt(words(3, 3)), Sampling(max_tokens=90)))
    await gate.reached()
    closing = asyncio.create_task(own.aclose())
    with pytest.raises(BackendUnavailable):
        await running
    gate.open.set()
    await closing
    assert gate.steps < 3
    with pytest.raises(BackendUnavailable):
        await own.generate(Prompt(words(3, 3)), GREEDY)


async def test_load_takes_other_weights_and_later_replies_carry_their_version(own: HFBackend, checkpoints: dict[str, Path]) -> None:
    prompt, other = Prompt(words(4, 4)), HFBackend(checkpoints["other"])
    before = await own.generate(prompt, GREEDY)
    wanted = await other.generate(prompt, GREEDY)
    await own.load(str(checkpoints["other"]), "step-1")
    after = await own.generate(prompt, GREEDY)
    assert (before.weights_version, after.weights_version, own.facts.weights_version) == (
        fingerprint(checkpoints["text"]),
        "step-1",
        "step-1",
    )
    assert before.ids != after.ids == wanted.ids
    assert after.logprobs == pytest.approx(wanted.logprobs, abs=1e-6)
    await other.aclose()


async def test_weights_of_another_model_are_refused_and_the_old_ones_stay(own: HFBackend, checkpoints: dict[str, Path]) -> None:
    before = await own.generate(Prompt(words(4, 4)), GREEDY)
    for wrong in (str(checkpoints["qwen2"]), str(checkpoints["text"] / "nowhere")):
        with pytest.raises(BackendError):
            await own.load(wrong, "step-1")
    after = await own.generate(Prompt(words(4, 4)), GREEDY)
    assert after.ids == before.ids and after.weights_version == before.weights_version != "step-1"


@pytest.mark.parametrize("place", ["/no/such/folder", "", "tokenizer.json", "nobody/nothing"])
def test_a_place_without_a_model_is_one_clear_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    wrong = place if "no" in place else str(tmp_path / place)
    with pytest.raises(BackendError, match="expected a model") as caught:
        HFBackend(wrong, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_damaged_and_unsafe_checkpoints_are_one_clear_sentence(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoints["text"], tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"not a checkpoint")
    pickled = Path(shutil.copytree(checkpoints["text"], tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    adapter = Path(shutil.copytree(checkpoints["text"], tmp_path / "adapter"))
    (adapter / "adapter_config.json").write_text("{}")
    for folder in (broken, pickled, adapter):
        with pytest.raises(BackendError) as caught:
            HFBackend(folder)
        assert folder.name in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_missing_are_never_left_random(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lame = Path(shutil.copytree(checkpoints["qwen2"], tmp_path / "lame"))
    weights = load_file(lame / "model.safetensors")
    lost = next(name for name in weights if "visual" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, lame / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackendError, match="1 are missing"):
        HFBackend(lame)


def test_facts_are_plain_and_hashes_do_not_depend_on_the_place(
    engines: dict[str, HFBackend], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = HFBackend(shutil.copytree(checkpoints["qwen2"], tmp_path / "copy"))
    one, other = engines["qwen2"].facts, copy.facts
    assert isinstance(copy, Backend)
    copy.tokenizer(["w1 w2", "w3"], padding=True)
    assert (one.tokenizer_hash, one.template_hash, one.extra) == (other.tokenizer_hash, other.template_hash, other.extra)
    assert one.template_hash == template_hash(tiny.TEMPLATE)
    assert (one.sees, one.context_length, one.extra["image_token_id"]) == (True, tiny.CONTEXT, tiny.IMAGE)
    assert not engines["text"].facts.sees and engines["text"].facts.extra["banned_ids"] == []


async def test_an_image_processor_under_its_common_name_works_without_torchvision(
    engines: dict[str, HFBackend], checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen2"], tmp_path / "common"))
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessorFast"))
    engine = HFBackend(folder)
    prompt = shown(engine, words(5, 5), picture(56, 56, 1))
    assert (await engine.generate(prompt, GREEDY)).ids == (await engines["qwen2"].generate(prompt, GREEDY)).ids
    assert capfd.readouterr() == ("", "")
    await engine.aclose()
