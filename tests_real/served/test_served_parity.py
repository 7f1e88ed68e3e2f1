"""The same checkpoint through SGLang and in process: token for token, log-prob for log-prob, with and without pictures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
from PIL.Image import Image, effect_noise, merge

from monologue.backends.base import Picture, Prompt, RequestRefused, Sampling
from monologue.backends.hf import HFBackend
from monologue.backends.serving.launch import Server
from monologue.seating import starter
from monologue.training.replay import agrees
from tests_real.served.kit import EOS, GREEDY, Connect

FRAME = 11, 12
SIZES = ((84, 84), (150, 90), (61, 200), (333, 334))


def strange(role: str, n: int, placeholders: Callable[[Image], Any], pad: int | None) -> list[Prompt]:
    """Random ids, and for the answerer up to three noisy pictures of random sizes anywhere among them."""
    dice, found = random.Random(role), list[Prompt]()
    for number in range(n):
        ids, pictures = [dice.randrange(15, 140) for _ in range(dice.randrange(2, 60))], list[Picture]()
        for _ in range(dice.randrange(1, 4) if role == "answerer" else 0):
            size = dice.choice(SIZES)
            image = merge("RGB", [effect_noise(size, dice.uniform(20, 120)) for _ in "RGB"])
            pictures.append(Picture(f"{number}/{len(pictures)}", image))
            ids += [FRAME[0], *[pad or 0] * placeholders(image).count, FRAME[1], *[dice.randrange(15, 140) for _ in range(3)]]
        found.append(Prompt(tuple(ids), tuple(pictures), str(number)))
    return found


@pytest.mark.parametrize("role", ["questioner", "answerer"])
async def test_greedy_tokens_and_log_probs_equal_those_in_process(
    servers: dict[str, Server], connect: Connect, local: Callable[..., HFBackend], dialogues: dict[str, list[Prompt]], role: str
) -> None:
    served, own = connect(servers[role]), local(starter(role))
    asked = dialogues[role][:250] + strange(role, 50, own.placeholders, own.image_token_id)
    theirs = await asyncio.gather(*(served.generate(prompt, GREEDY) for prompt in asked))
    ours = await asyncio.gather(*(own.generate(prompt, GREEDY) for prompt in asked))
    assert [one.ids for one in theirs] == [one.ids for one in ours]
    assert [one.finish_reason for one in theirs] == [one.finish_reason for one in ours]
    assert [one.images for one in theirs] == [one.images for one in ours]
    gaps = [abs(a - b) for x, y in zip(theirs, ours, strict=True) for a, b in zip(x.logprobs or (), y.logprobs or (), strict=True)]
    assert len(gaps) > 800 and agrees(max(gaps), fmean(gaps)), (max(gaps), fmean(gaps))


async def test_scores_equal_those_in_process(
    servers: dict[str, Server], connect: Connect, local: Callable[..., HFBackend], dialogues: dict[str, list[Prompt]]
) -> None:
    served, own, ids = connect(servers["answerer"]), local(starter("answerer")), (20, 21, EOS)
    gaps: list[float] = []
    for prompt in dialogues["answerer"][:20]:
        mine, theirs = await own.score(prompt, ids, Sampling()), await served.score(prompt, ids, Sampling())
        gaps += [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
    assert agrees(max(gaps), fmean(gaps)), (max(gaps), fmean(gaps))
    with pytest.raises(RequestRefused, match="replay in process"):
        await served.score(prompt, ids, Sampling(temperature=0.5))


async def test_placeholders_are_never_sampled(servers: dict[str, Server], connect: Connect, dialogues: dict[str, list[Prompt]]) -> None:
    served, hot = connect(servers["answerer"]), Sampling(temperature=50.0, max_tokens=60)
    found = await asyncio.gather(*(served.generate(prompt, hot) for prompt in dialogues["answerer"][:30]))
    assert not {token for one in found for token in one.ids} & set(served.facts.extra["banned_ids"])
