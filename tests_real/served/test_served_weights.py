"""New weights while serving: full ones and adapters, to every server, checked by version and by number; swaps midway by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from copy import copy
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from monologue.agents.load import seat
from monologue.agents.messages import Message
from monologue.agents.policy import Stream
from monologue.backends.base import BackendError, Generation, Prompt, Sampling
from monologue.backends.hf import HFBackend
from monologue.backends.serving.launch import Server
from monologue.backends.sglang import SGLangBackend
from monologue.graphs.play import aplay
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunReader, RunWriter
from monologue.training.replay import Weights, areplay
from tests_real.served.kit import ALL, GREEDY, Connect, adapter, post, running, scaled


@pytest.fixture
async def questioner(servers: dict[str, Server], connect: Connect) -> AsyncIterator[SGLangBackend]:
    """A client of the shared questioner, which gets its own weights back afterwards."""
    client = connect(servers["questioner"])
    yield client
    await client.load(str(starter("questioner")), client.server["weight_version"])


async def test_no_call_after_load_carries_the_old_version_under_load(
    questioner: SGLangBackend, local: Callable[..., HFBackend], dialogues: dict[str, list[Prompt]], tmp_path: Path
) -> None:
    other, asked = scaled(tmp_path / "other", 1.02), dialogues["questioner"][:200]
    returned, loaded = list[tuple[bool, Generation]](), False

    async def worker(prompts: list[Prompt]) -> None:
        for prompt in prompts:
            generation = await questioner.generate(prompt, GREEDY)
            returned.append((loaded, generation))

    load = [asyncio.ensure_future(worker(asked[start::16])) for start in range(16)]
    while len(returned) < 20:
        await asyncio.sleep(0.01)
    await questioner.load(str(other), "step-1")
    loaded = True
    await asyncio.gather(*load)
    assert {one.weights_version for late, one in returned if late} == {"step-1"} == {questioner.facts.weights_version}
    assert {one.weights_version.partition(":")[0] for late, one in returned if not late} <= {"base", "step-1"}
    assert sum(late for late, _ in returned) > 50 and not any(one.weights for _, one in returned)
    theirs = await asyncio.gather(*(questioner.generate(prompt, GREEDY) for prompt in asked[:40]))
    ours = await asyncio.gather(*(local(other).generate(prompt, GREEDY) for prompt in asked[:40]))
    assert [one.ids for one in theirs] == [one.ids for one in ours]
    with pytest.raises(BackendError, match="step-2"):
        await questioner.load(str(tmp_path / "nowhere"), "step-2")
    assert (await questioner.generate(asked[0], GREEDY)).weights_version == "step-1"


async def test_weights_that_change_forty_times_under_load_lose_no_request(
    questioner: SGLangBackend, dialogues: dict[str, list[Prompt]], tmp_path: Path
) -> None:
    folders, ended, answered = (scaled(tmp_path / "other", 1.001), starter("questioner")), asyncio.Event(), list[Generation]()

    async def worker(prompts: list[Prompt]) -> None:
        for prompt in cycle(prompts):
            answered.append(await questioner.generate(prompt, replace(GREEDY, temperature=1.0)))
            if ended.is_set():
                return

    load = [asyncio.ensure_future(worker(dialogues["questioner"][start::16])) for start in range(16)]
    for step in range(40):
        before = len(answered)
        await questioner.load(str(folders[step % 2]), f"step-{step}")
        while len(answered) < before + 8:
            await asyncio.sleep(0.01)
    ended.set()
    await asyncio.gather(*load)
    assert {one.weights_version for one in answered} >= {f"step-{step}" for step in range(40)} and questioner.reloads == 0


async def test_a_swap_in_mid_generation_is_recorded_by_token_and_replays_by_version(
    questioner: SGLangBackend, servers: dict[str, Server], dialogues: dict[str, list[Prompt]], tmp_path: Path
) -> None:
    other, base = scaled(tmp_path / "other", 1.02), questioner.facts.weights_version
    policy = seat(questioner, "questioner", ALL, "questioner")
    endless: Any = copy(policy.codec)
    endless.stop_ids = ()
    policy = replace(policy, codec=endless)
    recorder = Recorder(RunWriter(tmp_path / "run"))

    async def speak(number: int) -> None:
        facts = {"problem_id": str(number), "task": "t", "graph": "g", "group_id": str(number), "question": "what ?"}
        with recorder.episode(**facts) as episode:
            with episode.policy(role="questioner", node="ask") as span:
                stream = Stream(policy, "questioner", number)
                await stream.act(span, [Message("user", "what is red ?", choices=("a1", "b2"))], (object,))
            episode.finish(None)

    speaking = [asyncio.ensure_future(speak(number)) for number in range(8)]
    while running(servers["questioner"].url) < 8:
        await asyncio.sleep(0.005)
    await questioner.load(str(other), "step-1", swap="midway")
    await asyncio.gather(*speaking)
    calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
    split = [call for call in calls if call.weights]
    assert split and all([version for version, _, _ in call.weights] == [base, "step-1"] for call in split)
    assert {len(call.sampled_ids) for call in calls} == {ALL.max_tokens}
    assert all(call.weights_version == "step-1" and call.weights[-1][2] == len(call.sampled_ids) for call in split)
    checks = await areplay(tmp_path / "run", Weights(tmp_path / "run", {"questioner@step-1": str(other)}))
    assert all(check.ok for check in checks), checks


async def test_weights_that_somebody_else_swaps_fail_the_episodes_under_way_and_no_others(
    servers: dict[str, Server], connect: Connect, tmp_path: Path
) -> None:
    other, url = scaled(tmp_path / "other", 1.001), servers["questioner"].url
    seats = {role: seat(connect(server), role, Sampling(temperature=0.0), role) for role, server in servers.items()}
    base = seats["questioner"].backend.facts.weights_version
    foreign = {"model_path": str(other), "weight_version": "foreign", "flush_cache": False}  # flushed under load, the server may die of it
    playing = asyncio.ensure_future(
        aplay("monologue", Shapes().problems("validation", 60), seats, tmp_path / "run", progress=False, concurrency=8)
    )
    try:
        while not any((tmp_path / "run" / "spans").glob("*.jsonl")) or len(list(RunReader(tmp_path / "run").episodes())) < 10:
            await asyncio.sleep(0.02)
        assert (await asyncio.to_thread(post, url, "/update_weights_from_disk", foreign))["success"]
        summary = await playing
    finally:
        await connect(servers["questioner"]).load(str(starter("questioner")), base)
    assert 1 <= len(summary.failed) <= 8 and summary.ok == 60 - len(summary.failed)
    assert all("in the middle of an episode" in (episode.error or "") for episode in summary.failed)
    for episode in RunReader(tmp_path / "run").episodes():
        versions = {call.weights_version for call in episode.calls() if call.role == "questioner"}
        assert len(versions) == 1 and (episode.end is None or episode.end.status in ("ok", "failed"))
    found = {call.weights_version for one in RunReader(tmp_path / "run").episodes() for call in one.calls() if call.role == "questioner"}
    assert found == {base, "foreign"}


async def test_an_adapter_is_taken_by_name_and_dropped_for_the_next(
    second: Server, connect: Connect, local: Callable[..., HFBackend], dialogues: dict[str, list[Prompt]], tmp_path: Path
) -> None:
    served, asked = connect(second), dialogues["questioner"][:30]
    base = served.server["weight_version"]
    plain = await asyncio.gather(*(served.score(prompt, (20, 21, 2), Sampling()) for prompt in asked))
    for number in (1, 2):
        folder, merged = adapter(tmp_path / f"adapter-{number}", tmp_path / f"merged-{number}", number)
        await served.load(str(folder), f"adapter-{number}")
        theirs = await asyncio.gather(*(served.score(prompt, (20, 21, 2), Sampling()) for prompt in asked))
        ours = await asyncio.gather(*(local(merged).score(prompt, (20, 21, 2), Sampling()) for prompt in asked))
        assert max(abs(a - b) for x, y in zip(theirs, ours, strict=True) for a, b in zip(x, y, strict=True)) < 1e-4
        assert max(abs(a - b) for x, y in zip(theirs, plain, strict=True) for a, b in zip(x, y, strict=True)) > 0.01
        assert {one.weights_version for one in await asyncio.gather(*(served.generate(p, GREEDY) for p in asked[:3]))} == {
            f"adapter-{number}"
        }
    await served.load(str(starter("questioner")), base)
    assert (await served.generate(asked[0], GREEDY)).weights_version == base
    again = await asyncio.gather(*(served.score(prompt, (20, 21, 2), Sampling()) for prompt in asked))
    assert max(abs(a - b) for x, y in zip(again, plain, strict=True) for a, b in zip(x, y, strict=True)) < 1e-5


async def test_an_adapter_is_refused_by_servers_that_were_not_started_for_it(
    servers: dict[str, Server], connect: Connect, tmp_path: Path
) -> None:
    folder, _ = adapter(tmp_path / "adapter", tmp_path / "merged", 1)
    with pytest.raises(BackendError, match="--lora-rank"):
        await connect(servers["questioner"]).load(str(folder), "adapter-1")
