"""``monologue serve --tiny`` as people start it: it prints addresses that play, and leaves no process behind."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from monologue.backends.latent import Habit
from monologue.backends.perception.modes import Mode
from monologue.backends.serving.launch import ready
from monologue.cli import main
from monologue.traces.store import RunReader
from tests.chatting_models import save_vision_model
from tests_real.served.kit import PYTHON


@asynccontextmanager
async def serving(*words: str) -> AsyncIterator[list[str]]:
    """``monologue serve`` while it runs: the words of the command that plays on it. It ends whole, whatever comes of the test."""
    serve = ("-m", "monologue", "serve", "--python", str(PYTHON), *words)
    process = await asyncio.create_subprocess_exec(sys.executable, *serve, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    told = list[str]()
    try:
        while not (told and told[-1].startswith("Ctrl-C")):
            told.append((await process.stdout.readline()).decode())
            assert told[-1], told
        yield next(line for line in told if line.startswith("play: monologue ")).split()[2:]
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_a_served_thinker_plays_and_its_trace_is_proven_in_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, run = ("--questioner", "none", "--answerer", "none", "--thinker", "starter", "--logs", str(tmp_path / "logs")), tmp_path / "run"
    async with serving("--tiny", *words) as play:
        both = ("--questioner", play[-1], "--answerer", play[-1])
        more = ("--task", "hops", "--graph", "latent:percent=0", "--n", "12", "--out", str(run))
        assert await asyncio.to_thread(main, [*play, *more, *both]) == 0
    assert "accuracy 1.000" in capsys.readouterr().out
    assert await asyncio.to_thread(main, ["verify", str(run)]) == 0
    assert "replay thinker" in capsys.readouterr().out
    calls = [call for episode in RunReader(run).episodes() for call in episode.calls()]
    assert {call.engine for call in calls} == {"sglang"} and not any(call.trainable for call in calls)
    assert all(2 <= len(call.chosen) <= 5 and all(len(step) == 2 for step in call.chosen) for call in calls)


async def test_a_thinker_with_a_chat_template_is_served_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its prompts end with several ids, of which the last, a line break, stands in replies as well."""
    folder, run = save_vision_model(tmp_path / "model"), tmp_path / "run"
    Habit(Mode(k=2), 2).save(folder)
    words = ("--questioner", "none", "--answerer", "none", "--thinker", str(folder), "--device", "cpu", "--logs", str(tmp_path / "logs"))
    async with serving(*words) as play:
        more = ("--task", "hops", "--graph", "latent:percent=0", "--n", "8", "--temperature", "1", "--max-tokens", "24", "--out", str(run))
        assert await asyncio.to_thread(main, ["play", "--thinker", play[-1], *more]) == 0
    assert await asyncio.to_thread(main, ["verify", str(run)]) == 0
    assert "replay thinker" in capsys.readouterr().out
    calls = [call for episode in RunReader(run).episodes() for call in episode.calls() if call.role == "thinker"]
    assert len(calls) == 8 and all(len(call.chosen) == 2 and all(len(step) == 2 for step in call.chosen) for call in calls)


async def test_serve_tiny_prints_a_command_that_plays_and_ends_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving("--tiny", "--answerer", "none", "--logs", str(tmp_path / "logs")) as play:
        assert await asyncio.to_thread(main, [*play, "--graph", "blind", "--n", "4", "--out", str(tmp_path / "run")]) == 0
        assert "prompt tokens from cache, by turn: 1: " in capsys.readouterr().out
    assert not ready(play[-1])
