"""Servers that die, hang, restart, or answer garbage in the middle of episodes: the episodes say so, and the run goes on.

The questioner is played by a server that may be harmed; the answerer by one that nobody touches.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from monologue.agents.load import seat
from monologue.backends.base import BackendError, BackendTimeout, BackendUnavailable, Prompt, Sampling
from monologue.backends.serving.launch import Server, lora_flags
from monologue.backends.sglang import SGLangBackend
from monologue.backends.wire import CUTS
from monologue.graphs.play import aplay
from monologue.graphs.summary import Summary
from monologue.proof import verify
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from tests_real.served.kit import GREEDY, Connect, Start

PROXY = Path(__file__).parent / "proxy.py"
COLD = Sampling(temperature=0.0)


def playing(client: SGLangBackend, answerer: SGLangBackend, run: Path, n: int = 40, **options: Any) -> asyncio.Task[Summary]:
    seats = {"questioner": seat(client, "questioner", COLD, "q"), "answerer": seat(answerer, "answerer", COLD, "a")}
    return asyncio.ensure_future(
        aplay("monologue", Shapes().problems("validation", n), seats, run, progress=False, **{"concurrency": 8, **options})
    )


async def under_way(task: asyncio.Task[Summary], run: Path, episodes: int = 4) -> None:
    """Until so many have ended, and not all."""
    while not any((run / "spans").glob("*.jsonl")) or sum(one.complete for one in RunReader(run).episodes()) < episodes:
        assert not task.done(), task
        await asyncio.sleep(0.02)


def ends(run: Path) -> Counter[tuple[int, str]]:
    """Episodes by attempt and how they ended."""
    return Counter((one.start.attempt, one.end.status if one.end else "never") for one in RunReader(run).episodes())


def sound(run: Path) -> bool:
    return all(check.ok for check in verify(run, replay=False))


@pytest.fixture
async def proxied(servers: dict[str, Server]) -> AsyncIterator[Any]:
    """Starts a proxy before the shared questioner that spoils some generations."""
    started = list[asyncio.subprocess.Process]()

    async def one(manner: str, first: int, last: int) -> str:
        words = (str(PROXY), servers["questioner"].url, manner, str(first), str(last))
        process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=asyncio.subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(await process.stdout.readline())}"

    yield one
    for process in started:
        process.kill()
        await process.wait()


@pytest.mark.parametrize(("manner", "word"), [("garbage", "expected JSON"), ("odd", "output_ids")])
async def test_garbage_fails_the_episodes_that_got_it_by_name(
    servers: dict[str, Server], connect: Connect, proxied: Any, tmp_path: Path, manner: str, word: str
) -> None:
    client = connect(await proxied(manner, 30, 34))
    summary = await playing(client, connect(servers["answerer"]), tmp_path / "run")
    assert len(summary.failed) == 5 and summary.ok == 35
    assert all("BackendError" in (one.error or "") and word in (one.error or "") for one in summary.failed)
    assert ends(tmp_path / "run") == {(0, "ok"): 35, (0, "failed"): 5}
    again = await playing(client, connect(servers["answerer"]), tmp_path / "run")
    assert not again.failed and again.skipped == 35 and sound(tmp_path / "run")


@pytest.mark.parametrize(("manner", "count"), [("cut", 2), ("busy", 20), ("lost", 2)])
async def test_a_lost_answer_is_asked_for_again_and_no_turn_is_lost_or_doubled(
    servers: dict[str, Server], connect: Connect, proxied: Any, tmp_path: Path, manner: str, count: int
) -> None:
    client = connect(await proxied(manner, 20, 19 + count))
    summary = await playing(client, connect(servers["answerer"]), tmp_path / "run")
    assert not summary.failed and client.fleet.wires[0].retried == count
    assert ends(tmp_path / "run") == {(0, "ok"): 40} and sound(tmp_path / "run")
    plain = await playing(connect(servers["questioner"]), connect(servers["answerer"]), tmp_path / "plain")
    assert {one.problem_id: one.answer for one in summary.episodes} == {one.problem_id: one.answer for one in plain.episodes}


async def test_a_request_that_cuts_every_connection_is_not_sent_for_ever(connect: Connect, proxied: Any) -> None:
    client = connect(await proxied("cut", 0, 10**6))
    with pytest.raises(BackendUnavailable, match=f"tried {CUTS} times"):
        await client.generate(Prompt((1, 5)), GREEDY)


async def test_a_server_that_hangs_fails_the_episodes_under_way_which_are_played_again_as_a_whole(
    servers: dict[str, Server], second: Server, connect: Connect, tmp_path: Path
) -> None:
    client, run = connect(second, timeout=2.0), tmp_path / "run"
    task = playing(client, connect(servers["answerer"]), run, retries=3)
    await under_way(task, run)
    os.killpg(second.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BackendTimeout, match="deadline"):
            await client.generate(Prompt((1, 5)), GREEDY)
        assert not await client.healthy(timeout=0.5)
        await asyncio.sleep(1.0)
    finally:
        os.killpg(second.process.pid, signal.SIGCONT)
    summary = await task
    assert not summary.failed and summary.ok == 40
    found = ends(run)
    assert found[0, "failed"] >= 1 and sum(count for (_, status), count in found.items() if status == "ok") == 40
    told = [one.end.error or "" for one in RunReader(run).episodes() if one.end and one.end.status == "failed"]
    assert all("BackendTimeout" in error and second.url in error for error in told) and sound(run)


async def test_a_server_that_dies_fails_what_it_was_asked_and_a_later_play_makes_it_good(
    servers: dict[str, Server], second: Server, start: Start, connect: Connect, tmp_path: Path
) -> None:
    client, run = connect(second, timeout=3.0), tmp_path / "run"
    task = playing(client, connect(servers["answerer"]), run)
    await under_way(task, run)
    second.kill()
    summary = await task
    assert summary.failed and summary.ok >= 4 and summary.ok + len(summary.failed) == 40
    assert {(one.error or "").partition(":")[0] for one in summary.failed} == {"BackendUnavailable"}, summary.failed
    assert ends(run) == {(0, "ok"): summary.ok, (0, "failed"): len(summary.failed)}
    with pytest.raises(BackendError, match="cannot be reached"):
        await client.generate(Prompt((1, 5)), GREEDY)

    port = int(second.url.rsplit(":", 1)[1])
    second.process = (await asyncio.to_thread(start, "questioner", *lora_flags(8, "cpu"), port=port)).process
    whole = await playing(connect(second), connect(servers["answerer"]), run)
    assert not whole.failed and whole.skipped == summary.ok and sound(run)


async def test_a_server_that_restarts_gets_its_weights_back_before_its_work_counts(
    servers: dict[str, Server], second: Server, start: Start, connect: Connect, tmp_path: Path
) -> None:
    client, run, port = connect(second, timeout=90.0), tmp_path / "run", int(second.url.rsplit(":", 1)[1])
    await client.load(str(starter("questioner")), "step-7")
    task = playing(client, connect(servers["answerer"]), run)
    await under_way(task, run)
    second.kill()
    second.process = (await asyncio.to_thread(start, "questioner", *lora_flags(8, "cpu"), port=port)).process
    summary = await task
    assert not summary.failed and client.reloads == 1 and ends(run) == {(0, "ok"): 40} and sound(run)
    calls = [call for one in RunReader(run).episodes() for call in one.calls() if call.role == "questioner"]
    assert {call.weights_version for call in calls} == {"step-7"}
