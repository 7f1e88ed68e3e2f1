"""What thinking costs beside saying it where both are served: the shipped thinker and the shipped speaker in SGLang, as users play them.

    python bench/thinking_served.py [--python .venv-sglang/bin/python] [--device cpu] [--n 128] [--repeats 5] [--json FILE]
    python bench/thinking_served.py --pair runs/thinkers6/0        # a pair that bench/thinkers.py made, for longer ways

Graph ``latent`` asks one server once an episode, and it takes the latent steps itself; graph ``monologue`` asks two others, one a seat, for
every turn. Greedy, every step recorded, 64 episodes at once, as many hops as the pair was taught, test problems
whose pictures are painted beforehand; the arms take turns within a repeat. Accuracy stands beside the seconds. It can lose: a thinker's
server runs without CUDA graphs, reads the picture like the other, and takes three places a step where the speaker says one word.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rollout import spread
from thinking import painted, pair_of, taught

from monologue.agents.load import codec_for, seat
from monologue.backends.base import Sampling
from monologue.backends.checkpoints import open_config, open_processors
from monologue.backends.latent import Habit
from monologue.backends.serving.latent import Thinking, environment
from monologue.backends.serving.launch import launch
from monologue.backends.sglang import SGLangBackend
from monologue.graphs.play import aplay
from monologue.tasks.base import Problem

TOGETHER, ROOM = 64, 64
SEATS = ("questioner", "answerer")
GRAPHS = {"graph latent": ("latent:percent=0", ("thinker", *SEATS)), "graph monologue": ("monologue", SEATS)}


def played(graph: str, roles: Sequence[str], urls: dict[str, str], problems: Sequence[Problem]) -> tuple[float, float]:
    """Seconds and accuracy."""

    async def go(run: Path) -> tuple[float, float]:
        clients = {role: SGLangBackend(urls[role], limit=TOGETHER) for role in roles}
        try:
            seats = {role: seat(client, role, Sampling(temperature=0.0), role) for role, client in clients.items()}
            started = time.perf_counter()
            summary = await aplay(graph, problems, seats, run, concurrency=TOGETHER, progress=False)
            seconds = time.perf_counter() - started
        finally:
            for client in clients.values():
                await client.aclose()
        if summary.failed:
            raise SystemExit(f"{len(summary.failed)} episodes failed: {summary.failed[0].error}")
        return seconds, summary.score().accuracy

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(go(Path(folder) / "run"))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--python", default=".venv-sglang/bin/python", help="where SGLang is installed")
    options.add_argument("--device", default="cpu")
    options.add_argument("--pair", type=Path, help="folder with a speaker and a thinker, in place of the shipped ones")
    options.add_argument("--n", type=int, default=128)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    speaker, thinker = pair_of(chosen.pair)
    config, habit = open_config(str(thinker)), Habit.load(thinker)
    worlds = {family: painted(family, chosen.n) for family in taught(thinker)}
    name = f"thinking_served{len(worlds)}" if chosen.pair else "thinking_served"
    rows: list[dict[str, Any]] = []
    with ExitStack() as running, tempfile.TemporaryDirectory() as logs:
        common: dict[str, Any] = {"python": chosen.python, "device": chosen.device}
        tokenizer, _ = open_processors(str(thinker), config)
        thinking = Thinking.of(habit, config, codec_for(tokenizer).ending, ROOM)
        orders = {
            "thinker": {"model": str(thinker), "flags": thinking.flags(config), "extra": environment(config)},
            **{role: {"model": str(speaker)} for role in SEATS},
        }
        urls = {
            name: running.enter_context(launch(**order, **common, log=Path(logs) / f"{name}.log")).url for name, order in orders.items()
        }
        for repeat in range(-1, chosen.repeats):  # the first is not counted
            for family, problems in worlds.items():
                for arm, (graph, roles) in GRAPHS.items():
                    seconds, accuracy = played(graph, roles, urls, problems)
                    rows += [{"repeat": repeat, "family": family, "arm": arm, "accuracy": round(accuracy, 4), "seconds": round(seconds, 3)}]
                    print(json.dumps(rows[-1]), flush=True)
    rows = [row for row in rows if row["repeat"] >= 0]
    ratio = {}
    for family in worlds:
        times = {arm: [row["seconds"] for row in rows if (row["family"], row["arm"]) == (family, arm)] for arm in GRAPHS}
        pairs = zip(times["graph monologue"], times["graph latent"], strict=True)
        ratio[f"graph monologue / graph latent, {family}"] = spread([a / b for a, b in pairs])
    print(json.dumps(ratio, indent=1))
    which = f"--pair {chosen.pair} " if chosen.pair else ""
    command = f"python bench/thinking_served.py {which}--device {chosen.device} --n {chosen.n} --repeats {chosen.repeats}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {"name": name, "command": command, "machine": machine, "together": TOGETHER, "rows": rows, "ratio": ratio}
    (chosen.json or Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
