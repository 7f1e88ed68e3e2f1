"""``monologue serve --tiny`` as people start it: it prints addresses that play, and leaves no process behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from monologue.backends.serving.launch import ready
from monologue.cli import main
from monologue.traces.store import RunReader
from tests_real.served.kit import PYTHON


async def told_by(*words: str) -> tuple[asyncio.subprocess.Process, list[str]]:
    """A running ``monologue serve`` and the words of the command that plays on it."""
    serve = ("-m", "monologue", "serve", "--tiny", "--python", str(PYTHON), *words)
    process = await asyncio.create_subprocess_exec(sys.executable, *serve, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    told = list[str]()
    while not (told and told[-1].startswith("Ctrl-C")):
        told.append((await process.stdout.readline()).decode())
        assert told[-1], told
    return process, next(line for line in told if line.startswith("play: monologue ")).split()[2:]


async def ended(process: asyncio.subprocess.Process, url: str) -> None:
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 60) == 0
    assert not ready(url)


async def test_a_served_thinker_plays_and_its_trace_is_proven_in_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--questioner", "none", "--answerer", "none", "--thinker", "starter", "--logs", str(tmp_path / "logs"))
    process, play = await told_by(*words)
    run = tmp_path / "run"
    more = ("--task", "hops", "--graph", "latent:percent=0", "--n", "12", "--out", str(run))
    both = ("--questioner", play[-1], "--answerer", play[-1])
    assert await asyncio.to_thread(main, [*play, *more, *both]) == 0
    assert "accuracy 1.000" in capsys.readouterr().out
    assert await asyncio.to_thread(main, ["verify", str(run)]) == 0
    assert "replay thinker" in capsys.readouterr().out
    calls = [call for episode in RunReader(run).episodes() for call in episode.calls()]
    assert {call.engine for call in calls} == {"sglang"} and not any(call.trainable for call in calls)
    assert all(2 <= len(call.chosen) <= 5 and all(len(step) == 2 for step in call.chosen) for call in calls)
    await ended(process, play[-1])


async def test_serve_tiny_prints_a_command_that_plays_and_ends_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process, words = await told_by("--answerer", "none", "--logs", str(tmp_path / "logs"))
    play = [*words, "--graph", "blind", "--n", "4", "--out", str(tmp_path / "run")]
    assert await asyncio.to_thread(main, play) == 0
    assert "prompt tokens from cache, by turn: 1: " in capsys.readouterr().out
    await ended(process, words[-1])
