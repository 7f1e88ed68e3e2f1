"""The client of real SGLang servers in figures: what it costs, whether it keeps the servers busy, what a killed server loses.

    python bench/serving.py [--calls 400] [--episodes 256] [--kills 4] [--device cpu --python .venv-sglang/bin/python] [--json FILE]

overhead    one call at a time, client and plain ``aiohttp`` in turn with the same body to the same server; median of paired differences.
            Target: under 1 ms. It can lose: checks, threads and base64 are all in it.
occupancy   64 episodes at once. ``under_way``: of these, so many wait for a server's answer, sampled 20 times a second; the others are
            between two calls. ``running``: what the servers' gauges say then; requests whose prompt is being read are in no gauge.
            ``batch``: by the servers' logs, the decode batch in which the average token was sampled, that of the average step, the fullest.
kills       the questioner's server is killed (SIGKILL, whole process group) at random moments while 64 episodes play, and started again by
            a supervisor. An episode whose request was cut off too often is played again as a whole, twice at most (``again``).
            Lost: problems without exactly one whole episode, answers other than those of a play without kills, breaches that
            ``monologue verify`` finds.
            Target: none. It can lose: a client that gives up, or asks twice and keeps both, shows here.

With ``--device cuda`` the same on a GPU; ``--questioner-model`` and ``--answerer-model`` serve other models there (overhead and occupancy).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import statistics
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from monologue.agents.load import seat
from monologue.backends.base import Prompt, Sampling
from monologue.backends.serving.launch import Server, launch
from monologue.backends.sglang import SGLangBackend
from monologue.graphs.play import aplay
from monologue.graphs.summary import Summary
from monologue.proof import verify
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader

ROLES = ("questioner", "answerer")
COLD = Sampling(temperature=0.0)
TOGETHER = 64
CLIENTS = dict[Path, dict[str, SGLangBackend]]()
"""Of each play, for whoever watches."""
STEP = re.compile(r"Decode batch.*?#running-req: (\d+)")
"""A line of a server's log (``--decode-log-interval 1``)."""


async def overhead(url: str, calls: int) -> dict[str, Any]:
    """Milliseconds a call, client less plain HTTP."""
    served, sampling = SGLangBackend(url), Sampling(temperature=0.0, max_tokens=1)
    ids, raw, ours = tuple(range(20, 120)), list[float](), list[float]()
    body = {**served._requests.generation(Prompt(ids), (), sampling), "rid": ""}
    async with aiohttp.ClientSession() as plain:
        for number in range(calls + 20):
            started = time.perf_counter()
            async with plain.post(f"{url}/generate", json={**body, "rid": f"{number:032x}"}) as answer:
                await answer.json()
            between = time.perf_counter()
            await served.generate(Prompt(ids), sampling)
            if number >= 20:
                raw.append(1e3 * (between - started))
                ours.append(1e3 * (time.perf_counter() - between))
    await served.aclose()
    gaps = sorted(b - a for a, b in zip(raw, ours, strict=True))
    low, high = gaps[int(0.5 * calls - calls**0.5)], gaps[int(0.5 * calls + calls**0.5)]  # 95 % interval of a median
    medians = {"raw_ms": round(statistics.median(raw), 3), "client_ms": round(statistics.median(ours), 3)}
    return {"part": "overhead", "calls": calls, **medians, "overhead_ms": round(statistics.median(gaps), 3), "interval_ms": [low, high]}


def play(urls: dict[str, str], n: int, run: Path, retries: int = 0, **options: Any) -> Summary:
    """A greedy play on served policies."""

    async def go() -> Summary:
        clients = CLIENTS[run] = {role: SGLangBackend(url, limit=TOGETHER, **options) for role, url in urls.items()}
        seats = {role: seat(client, role, COLD, role) for role, client in clients.items()}
        try:
            problems, settings = Shapes().problems("validation", n), {"concurrency": TOGETHER, "retries": retries}
            return await aplay("monologue", problems, seats, run, progress=False, **settings)
        finally:
            for client in clients.values():
                await client.aclose()

    return asyncio.run(go())


def load_of(url: str) -> tuple[int, int]:
    """Requests running and waiting."""
    with urllib.request.urlopen(f"{url}/v1/loads", timeout=10) as answer:
        loads = json.load(answer)["loads"]
    return sum(one["num_running_reqs"] for one in loads), sum(one["num_waiting_reqs"] for one in loads)


def occupancy(servers: dict[str, Server], n: int) -> dict[str, Any]:
    """How many of the 64 episodes have a request in a server, and in batches of what size their tokens were sampled."""
    urls, samples, done = {role: server.url for role, server in servers.items()}, list[dict[str, float]](), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"

        def watch() -> None:
            while not done.wait(0.05):
                sent = {f"sent_{role}": client.fleet.under_way for role, client in CLIENTS.get(run, {}).items()}
                loads = {role: load_of(url) for role, url in urls.items()}
                samples.append(
                    {**sent, **{role: load[0] for role, load in loads.items()}, "queue": any(load[1] for load in loads.values())}
                )

        watcher, logged = threading.Thread(target=watch), {role: server.log.stat().st_size for role, server in servers.items()}
        watcher.start()
        started = time.perf_counter()
        try:
            summary = play(urls, n, run)
        finally:
            done.set()
            watcher.join()
        seconds = time.perf_counter() - started
    full = samples[len(samples) // 10 : int(0.7 * len(samples))]  # without the beginning and the tail, when fewer episodes are left

    def mean(*names: str) -> float:
        return round(statistics.fmean(sum(sample[name] for name in names) for sample in full), 2)

    sent = mean(*(f"sent_{role}" for role in urls))
    return {
        "part": "occupancy",
        "episodes": n,
        "failed": len(summary.failed),
        "seconds": round(seconds, 1),
        "under_way": {**{role: mean(f"sent_{role}") for role in urls}, "both": sent},
        "running": {role: mean(role) for role in urls},
        "batch": {role: batches(servers[role].log, logged[role]) for role in urls},
        "occupancy": round(sent / TOGETHER, 3),
        "samples_with_a_queue": mean("queue"),
        "samples": len(full),
        "cached": {turn + 1: round(share, 3) for turn, share in summary.cached().items()},
    }


def batches(log: Path, since: int) -> dict[str, float]:
    """Requests in a decode step, from a server's log: of the average token, of the average step, of the fullest."""
    sizes = [int(size) for size in STEP.findall(log.read_bytes()[since:].decode(errors="replace"))]
    return {"token": round(sum(size**2 for size in sizes) / sum(sizes), 1), "step": round(statistics.fmean(sizes), 1), "most": max(sizes)}


def kills(start: Any, answerer: str, wanted: int) -> dict[str, Any]:
    """Plays while the questioner's server is killed so often; what was lost."""
    dice, server, killed, played = random.Random(0), start(), list[float](), threading.Event()
    port, n = int(server.url.rsplit(":", 1)[1]), TOGETHER * (wanted + 2)
    urls, current = {"questioner": server.url, "answerer": answerer}, [server]

    def kill_and_restart() -> None:
        while len(killed) < wanted:
            if played.wait(dice.uniform(0.3, 1.5)):
                return
            if sum(load_of(server.url)):
                current[0].kill()
                killed.append(time.time())
                current[0] = start(port=port)

    killer = threading.Thread(target=kill_and_restart)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ended:
        ended.callback(lambda: current[0].stop())
        calm = play(urls, n, Path(folder) / "calm")
        killer.start()
        try:
            rough = play(urls, n, Path(folder) / "rough", retries=2, timeout=300.0, attempts=200)
        finally:
            played.set()
            killer.join()
        return {"part": "kills", "kills": len(killed), "episodes": n, **lost(calm, rough, Path(folder))}


def lost(calm: Summary, rough: Summary, folder: Path) -> dict[str, Any]:
    """Problems without exactly one whole episode, other answers, other numbers of turns, breaches."""
    attempts = list(RunReader(folder / "rough").episodes())
    whole = Counter(one.start.problem_id for one in attempts if one.complete)
    answers = [{one.problem_id: (one.answer, one.turns) for one in summary.episodes} for summary in (calm, rough)]
    return {
        "again": len(attempts) - len(answers[0]),
        "failed": len(rough.failed),
        "not_exactly_once": sum(whole[name] != 1 for name in answers[0] | whole),
        "other_answers": sum(answers[0][name] != answers[1].get(name) for name in answers[0]),
        "breaches": [check.name for check in verify(folder / "rough", replay=False) if not check.ok],
        "turns": sum(len(one.spans) for one in attempts if one.complete),
    }


def measured(chosen: argparse.Namespace, servers: dict[str, Server], start: Any) -> Iterator[dict[str, Any]]:
    """One row a part, as they come."""
    urls = {role: server.url for role, server in servers.items()}
    if chosen.calls:
        yield asyncio.run(overhead(urls["questioner"], chosen.calls))
    if chosen.episodes:
        yield occupancy(servers, chosen.episodes)
    if chosen.kills:
        servers["questioner"].stop()
        yield kills(start, urls["answerer"], chosen.kills)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--calls", type=int, default=400)
    options.add_argument("--episodes", type=int, default=256)
    options.add_argument("--kills", type=int, default=4)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--dtype", default="")
    options.add_argument("--python", default=".venv-sglang/bin/python", help="the Python in which sglang is installed")
    for role in ROLES:
        options.add_argument(f"--{role}-model", default=str(starter(role)), metavar="MODEL")
    options.add_argument("--flag", action="append", default=[], help="a further flag of the servers, e.g. --flag=--mem-fraction-static=0.4")
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    chosen = options.parse_args()
    with ExitStack() as running:
        logs = Path(running.enter_context(tempfile.TemporaryDirectory()))
        common = {
            "python": chosen.python,
            "device": chosen.device,
            "dtype": chosen.dtype,
            "flags": ["--decode-log-interval", "1", *chosen.flag],
        }

        def start(role: str, **more: Any) -> Server:
            return launch(getattr(chosen, f"{role}_model"), log=logs / f"{role}.log", **common, **more)

        with ThreadPoolExecutor() as pool:
            servers = dict(zip(ROLES, pool.map(start, ROLES), strict=True))
        for server in servers.values():
            running.enter_context(server)
        rows = list[dict[str, Any]]()
        for row in measured(chosen, servers, partial(start, "questioner")):
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
            keep(chosen, rows)


def keep(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the rows so far, so that a run that is cut short keeps what it measured."""
    command = f"python bench/serving.py --calls {chosen.calls} --episodes {chosen.episodes} --kills {chosen.kills} --device {chosen.device}"
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    ratio = {row["part"]: row.get("overhead_ms", row.get("occupancy", row.get("other_answers"))) for row in rows}
    result = {"name": "serving", "command": command, "machine": machine, "rows": rows, "ratio": ratio}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
