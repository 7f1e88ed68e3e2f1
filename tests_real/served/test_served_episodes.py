"""Episodes on real servers: traces that replay, prefixes from the cache, facts on every span, deadlines, cancellation."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest

from monologue.agents.load import seat
from monologue.backends.base import Prompt, Sampling
from monologue.backends.serving.launch import Server
from monologue.graphs.play import aplay
from monologue.proof import verify
from monologue.tasks.shapes import Shapes
from monologue.traces import names
from monologue.traces.store import RunReader
from tests_real.served.kit import ALL, GREEDY, Connect, running


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=1.5),
        Sampling(temperature=2.0, top_p=0.9),
        Sampling(temperature=2.0, top_k=5),
        Sampling(temperature=0.7, top_p=0.8, top_k=20),
    ],
)
async def test_traces_sampled_by_the_server_replay_in_process(
    servers: dict[str, Server], connect: Connect, tmp_path: Path, sampling: Sampling
) -> None:
    seats = {role: seat(connect(server), role, sampling, role) for role, server in servers.items()}
    summary = await aplay("monologue", Shapes().problems("validation", 16), seats, tmp_path / "run", progress=False)
    assert not summary.failed
    checks = await asyncio.to_thread(verify, tmp_path / "run")
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    assert {"replay questioner", "replay answerer"} <= {check.name for check in checks}
    spans = [span for episode in RunReader(tmp_path / "run").episodes() for span in episode.spans]
    for span in spans:
        facts = span.attributes
        assert (facts[names.ENGINE], facts[names.DTYPE], facts[names.SERVER]) == ("sglang", "float32", "127.0.0.1")
        assert facts[names.PORT] == int(servers[str(facts[names.ROLE])].url.rsplit(":", 1)[1])
        assert str(facts[names.ENGINE_VERSION]).startswith("0.5") and str(facts[names.WEIGHTS]).startswith("base:")
        assert {names.MODEL, names.TOKENIZER, names.TEMPLATE} <= set(facts) and names.SEED not in facts


async def test_from_the_second_turn_on_nearly_all_that_was_there_before_comes_from_the_cache(
    servers: dict[str, Server], connect: Connect, tmp_path: Path
) -> None:
    seats = {role: seat(connect(server), role, Sampling(temperature=0.0), role) for role, server in servers.items()}
    summary = await aplay("monologue", Shapes().problems("validation", 24), seats, tmp_path / "run", progress=False, concurrency=8)
    later = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls() if call.turn > 0]
    cached, prompts = sum(call.cached_tokens or 0 for call in later), sum(len(call.prompt_ids) for call in later)
    assert cached >= 0.9 * sum(call.prefix_length or 0 for call in later)
    assert {turn for turn in summary.cached()} == {0, *(call.turn for call in later)}
    assert cached >= 0.8 * prompts


async def test_a_cancelled_call_frees_its_place_on_the_server(
    servers: dict[str, Server], connect: Connect, dialogues: dict[str, list[Prompt]]
) -> None:
    served, prompt = connect(servers["questioner"]), dialogues["questioner"][0]
    calls = [asyncio.ensure_future(served.generate(prompt, ALL)) for _ in range(4)]
    while running(servers["questioner"].url) == 0:
        await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    for _ in range(50):
        if running(servers["questioner"].url) == 0:
            break
        await asyncio.sleep(0.2)
    assert running(servers["questioner"].url) == 0
    assert (await served.generate(prompt, GREEDY)).ids


async def test_a_generation_can_be_heard_as_it_grows(
    servers: dict[str, Server], connect: Connect, dialogues: dict[str, list[Prompt]]
) -> None:
    for role in ("questioner", "answerer"):
        served, prompt, parts = connect(servers[role]), dialogues[role][0], list[tuple[int, ...]]()
        long = Sampling(temperature=0.0, max_tokens=60)
        heard = await served.generate(prompt, long, heard=parts.append)
        plain = await served.generate(prompt, long)
        assert (heard.ids, heard.finish_reason) == (plain.ids, plain.finish_reason) and parts[-1] == heard.ids
        assert max(abs(a - b) for a, b in zip(heard.logprobs or (), plain.logprobs or (), strict=True)) < 1e-5
        assert len(parts) > 5 and all(after[: len(before)] == before for before, after in pairwise(parts))


async def test_warm_up_and_health_ask_every_server(servers: dict[str, Server], connect: Connect) -> None:
    served = connect(servers["questioner"])
    await served.warm()
    assert await served.healthy()
