"""Several servers of one policy: every episode stays with one of them, weights go to all."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from monologue.agents.load import seat
from monologue.backends.base import BackendError, Prompt, Sampling
from monologue.backends.serving.launch import Server, environment, free_port
from monologue.graphs.play import aplay
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces import names
from monologue.traces.store import RunReader
from tests_real.served.kit import GREEDY, PYTHON, Connect


async def test_episodes_are_shared_out_and_each_stays_where_it_began(
    servers: dict[str, Server], second: Server, connect: Connect, tmp_path: Path
) -> None:
    client = connect(servers["questioner"], second)
    seats = {"questioner": seat(client, "questioner", Sampling(temperature=0.0), "q")}
    seats["answerer"] = seat(connect(servers["answerer"]), "answerer", Sampling(temperature=0.0), "a")
    try:
        await client.load(str(starter("questioner")), "step-3")
        summary = await aplay("monologue", Shapes().problems("validation", 40), seats, tmp_path / "run", progress=False)
    finally:
        await client.load(str(starter("questioner")), client.server["weight_version"])
    assert not summary.failed
    homes = list[int]()
    for episode in RunReader(tmp_path / "run").episodes():
        asked = [span.attributes for span in episode.spans if span.attributes[names.ROLE] == "questioner"]
        assert len({facts[names.PORT] for facts in asked}) == 1 and {facts[names.WEIGHTS] for facts in asked} == {"step-3"}
        homes.append(int(asked[0][names.PORT]))
    assert min(homes.count(port) for port in set(homes)) >= 10 and len(set(homes)) == 2
    later = [call for one in RunReader(tmp_path / "run").episodes() for call in one.calls() if call.turn and call.role == "questioner"]
    assert sum(call.cached_tokens or 0 for call in later) >= 0.9 * sum(call.prefix_length or 0 for call in later)


async def test_servers_of_other_models_are_no_fleet(servers: dict[str, Server], connect: Connect) -> None:
    with pytest.raises(BackendError, match="one model"):
        connect(servers["questioner"], servers["answerer"])
    assert await connect(servers["questioner"]).healthy()


@pytest.fixture
async def router(servers: dict[str, Server], second: Server, tmp_path: Path) -> AsyncIterator[str]:
    """SGLang's own router before both questioners."""
    port, other = free_port(), free_port()
    words = ("-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(other))
    workers = ("--policy", "manual", "--assignment-mode", "min_group", "--worker-urls", servers["questioner"].url, second.url)
    with (tmp_path / "router.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(str(PYTHON), *words, *workers, stdout=log, stderr=log, env=environment("cpu"))
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while time.monotonic() < deadline and len(await asyncio.to_thread(workers_of, url)) < 2:
        assert process.returncode is None, (tmp_path / "router.log").read_text()
        await asyncio.sleep(0.2)
    yield url
    process.terminate()
    await process.wait()


def workers_of(url: str) -> list[str]:
    try:
        with urllib.request.urlopen(f"{url}/workers", timeout=5) as answer:
            return [one["url"] for one in json.load(answer)["workers"] if one["is_healthy"]]
    except OSError:
        return []


async def test_behind_the_router_episodes_stay_together_and_weights_reach_every_server(
    servers: dict[str, Server], second: Server, router: str, connect: Connect, tmp_path: Path
) -> None:
    client = connect(router)
    assert {wire.url for wire in client.fleet.wires} == {servers["questioner"].url, second.url}
    seats = {"questioner": seat(client, "questioner", Sampling(temperature=1.2), "q")}
    seats["answerer"] = seat(connect(servers["answerer"]), "answerer", Sampling(temperature=1.2), "a")
    try:
        await client.load(str(starter("questioner")), "step-4")
        summary = await aplay("monologue", Shapes().problems("validation", 40), seats, tmp_path / "run", progress=False)
        for server in (servers["questioner"], second):
            assert (await connect(server).generate(Prompt((1, 5)), GREEDY)).weights_version == "step-4"
    finally:
        await client.load(str(starter("questioner")), client.server["weight_version"])
    assert not summary.failed
    calls = [call for one in RunReader(tmp_path / "run").episodes() for call in one.calls() if call.role == "questioner"]
    assert {call.weights_version for call in calls} == {"step-4"}
    later = [call for call in calls if call.turn]
    assert sum(call.cached_tokens or 0 for call in later) >= 0.8 * sum(call.prefix_length or 0 for call in later)
    with pytest.raises(BackendError, match="truncated distribution"):
        await client.generate(Prompt((1, 5)), Sampling(top_p=0.9))
