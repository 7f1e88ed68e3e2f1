"""Reading only what is new changes no token and no number that matters; what does not fit is read from its beginning."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from PIL import Image

from monologue.backends.base import Generation, Picture, Prompt, Sampling
from monologue.backends.hf import HFBackend
from monologue.backends.prefixes import Prefix, Prefixes
from tests import tiny_models as tiny

SAMPLED = Sampling(temperature=1.3, max_tokens=6, stop_ids=(tiny.EOS,))
FAMILIES = ["text", "qwen2", "qwen2_5"]
PICTURE = Picture("a" * 64, Image.radial_gradient("L").resize((56, 56)).convert("RGB"))
OTHER = Picture("b" * 64, Image.new("RGB", (56, 84), "red"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    found = {"text": tiny.save_text_model(root / "text"), "other": tiny.save_text_model(root / "other", seed=1)}
    return {**found, **{family: tiny.save_vision_model(root / family, family) for family in FAMILIES[1:]}}


def shown(engine: HFBackend, picture: Picture) -> tuple[int, ...]:
    return (tiny.START, *(tiny.IMAGE,) * engine.placeholders(picture.image).count, tiny.END)


async def dialogue(engine: HFBackend, name: str, turns: int, second_picture: bool = False) -> list[Generation]:
    """A stream that grows by two words a turn."""
    dice, ids, pictures = random.Random(name), (7, 8, 9), list[Picture]()
    found = []
    for turn in range(turns):
        if engine.facts.sees and (turn == 0 or (second_picture and turn == 2)):
            pictures.append(PICTURE if turn == 0 else OTHER)
            ids += shown(engine, pictures[-1])
        ids += tuple(dice.randrange(6, 40) for _ in range(2 + len(name) % 3))
        found.append(
            await engine.generate(Prompt(ids, tuple(pictures), name), Sampling(1.3, max_tokens=5, seed=turn, stop_ids=(tiny.EOS,)))
        )
        ids += found[-1].ids
    return found


@pytest.mark.parametrize("family", FAMILIES)
async def test_streams_that_go_on_say_the_same_with_and_without_the_store(checkpoints: dict[str, Path], family: str) -> None:
    engines = [HFBackend(checkpoints[family], prefix_tokens=size) for size in (32768, 0)]
    names = [f"episode{'x' * number}" for number in range(8)]
    with_store, without = [await asyncio.gather(*(dialogue(engine, name, 4) for name in names)) for engine in engines]
    for mine, theirs in zip(with_store, without, strict=True):
        assert [one.ids for one in mine] == [one.ids for one in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        assert mine[0].cached_tokens == 0 and all((one.cached_tokens or 0) > 8 for one in mine[1:])
        assert all(one.cached_tokens == 0 for one in theirs)
    for engine in engines:
        await engine.aclose()


@pytest.mark.parametrize("family", FAMILIES[1:])
async def test_a_new_picture_is_read_with_all_that_stands_before_it(checkpoints: dict[str, Path], family: str) -> None:
    engines = [HFBackend(checkpoints[family], prefix_tokens=size) for size in (32768, 0)]
    mine, theirs = [await dialogue(engine, "pictures", 4, second_picture=True) for engine in engines]
    assert [one.ids for one in mine] == [one.ids for one in theirs]
    assert [bool(one.cached_tokens) for one in mine] == [False, True, False, True]
    for engine in engines:
        await engine.aclose()


async def test_new_weights_and_other_beginnings_are_read_anew(checkpoints: dict[str, Path]) -> None:
    engine, other = HFBackend(checkpoints["text"]), HFBackend(checkpoints["other"], prefix_tokens=0)
    first = await engine.generate(Prompt((7, 8, 9), (), "a"), SAMPLED)
    longer = (7, 8, 9, *first.ids, 10, 11)
    assert (await engine.generate(Prompt(longer, (), "b"), SAMPLED)).cached_tokens == 0, "another stream"
    assert (await engine.generate(Prompt((7, 8, 8, *longer[3:]), (), "a"), SAMPLED)).cached_tokens == 0, "another beginning"
    assert (await engine.generate(Prompt(longer, (), ""), SAMPLED)).cached_tokens == 0, "no stream"
    await engine.load(str(checkpoints["other"]), "step-1")
    greedy = Sampling(temperature=0.0, max_tokens=8)
    after, wanted = await engine.generate(Prompt(longer, (), "a"), greedy), await other.generate(Prompt(longer), greedy)
    assert after.cached_tokens == 0 and after.ids == wanted.ids
    await engine.aclose()
    await other.aclose()


def test_the_store_keeps_within_its_size_and_forgets_the_oldest() -> None:
    store = Prefixes(10)
    for name in ("a", "b", "c"):
        store.put(name, Prefix((1, 2, 3, 4), (), ()))
    assert store.find("a", (1, 2, 3, 4, 5), ()) is None and store.find("c", (1, 2, 3, 4, 5), ()) is not None
    store.put("c", Prefix((1, 2, 3, 4, 5, 6), (), ()))
    found = store.find("c", (1, 2, 3, 4, 5, 6, 7), ())
    assert found is not None and len(found.ids) == 6
    assert store.find("c", (1, 2, 3, 4, 5, 6), ()) is None, "at least one id is left to read"
    assert store.find("c", (1, 2, 3, 4, 5, 6, 7), ("x",)) is None
