"""Several servers of one policy: every episode stays with one of them, weights go to all."""

from __future__ import annotations

from pathlib import Path

import pytest

from monologue.agents.load import seat
from monologue.backends.base import BackendError, Sampling
from monologue.backends.serving.launch import Server
from monologue.graphs.play import aplay
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces import names
from monologue.traces.store import RunReader
from tests_real.served.kit import GREEDY, Connect


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
    assert (await connect(servers["questioner"]).healthy()) and GREEDY
