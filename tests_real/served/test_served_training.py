"""Reinforcement whose episodes are played by real servers: the gate proves every batch, and each version of the weights reaches them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from monologue.backends.hf import HFBackend
from monologue.backends.serving.launch import Server
from monologue.proof import verify
from monologue.rollouts import reinforce
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from monologue.training.recipe import RecipeError
from tests_real.served.kit import GREEDY, Connect, scaled

FAMILIES = ["attribute", "near"]
SMALL: dict[str, Any] = {
    **{"problems": 4, "samples": 4, "temperature": 1.0, "max_tokens": 24, "max_turns": 5, "families": ",".join(FAMILIES), "lr": 1e-3},
    **{"guards": {"entropy": None, "drift": 1e-4}, "rewards": {"tokens": -0.02}, "trained": ["questioner", "answerer"], "keep": 9},
}


def test_servers_play_what_is_trained_and_learn_every_version(
    servers: dict[str, Server], connect: Connect, tmp_path: Path, dialogues: dict[str, Any]
) -> None:
    clients = {role: connect(server) for role, server in servers.items()}
    strange = scaled(tmp_path / "strange", 1.05)
    asyncio.run(clients["questioner"].load(str(strange), "somebody-elses"))
    recipe = {**SMALL, "iterations": 3, "served": {role: server.url for role, server in servers.items()}}
    try:
        lines = reinforce(recipe, tmp_path / "run", Shapes(FAMILIES))
        for role in servers:
            assert all(line[f"{role} compared"] > 0 and line[f"{role} drift"] < 1e-5 and line[f"{role} masked"] == 0 for line in lines)
        calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
        assert {call.engine for call in calls} == {"sglang"}
        assert {call.weights_version.partition(".")[0].partition(":")[0] for call in calls} == {"base", "v1", "v2"}
        checks = verify(tmp_path / "run")
        assert all(check.ok for check in checks), [check for check in checks if not check.ok]
        asked = dialogues["questioner"][:20]

        async def said(engine: Any) -> list[tuple[int, ...]]:
            return [one.ids for one in await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in asked))]

        trained = HFBackend(tmp_path / "run" / "questioner")
        assert asyncio.run(said(clients["questioner"])) == asyncio.run(said(trained))
    finally:
        for role, client in clients.items():
            asyncio.run(client.load(str(starter(role)), str(client.server["weight_version"])))


def test_a_served_role_that_is_not_trained_plays_with_the_weights_that_the_recipe_names(
    servers: dict[str, Server], connect: Connect, tmp_path: Path
) -> None:
    client = connect(servers["answerer"])
    asyncio.run(client.load(str(scaled(tmp_path / "strange", 1.05, "answerer")), "somebody-elses"))
    try:
        recipe = {**SMALL, "trained": ["questioner"], "iterations": 1, "served": {"answerer": servers["answerer"].url}}
        reinforce(recipe, tmp_path / "run", Shapes(FAMILIES))
        calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
        assert {(call.role, call.engine) for call in calls} == {("questioner", "transformers"), ("answerer", "sglang")}
        assert all(call.weights_version.startswith("base:") for call in calls)
        checks = verify(tmp_path / "run")
        assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    finally:
        asyncio.run(client.load(str(starter("answerer")), str(client.server["weight_version"])))


def test_a_role_without_a_seat_cannot_be_served(tmp_path: Path) -> None:
    recipe = {**SMALL, "trained": ["questioner"], "iterations": 1, "graph": "blind", "served": {"answerer": "http://127.0.0.1:1"}}
    with pytest.raises(RecipeError, match="no seat for answerer"):
        reinforce(recipe, tmp_path / "run", Shapes(FAMILIES))
