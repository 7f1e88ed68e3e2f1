"""``monologue serve --tiny`` as people start it: it prints addresses that play, and leaves no process behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from monologue.backends.serving.launch import ready
from monologue.cli import main
from tests_real.served.kit import PYTHON


async def test_serve_tiny_prints_a_command_that_plays_and_ends_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-m", "monologue", "serve", "--tiny", "--answerer", "none", "--python", str(PYTHON), "--logs", str(tmp_path / "logs"))
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    told = list[str]()
    while not (told and told[-1].startswith("Ctrl-C")):
        told.append((await process.stdout.readline()).decode())
        assert told[-1], told
    command = next(line for line in told if line.startswith("play: monologue "))
    url = command.split()[-1]
    play = [*command.split()[2:], "--graph", "blind", "--n", "4", "--out", str(tmp_path / "run")]
    assert await asyncio.to_thread(main, play) == 0
    assert "prompt tokens from cache, by turn: 1: " in capsys.readouterr().out
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 60) == 0
    assert not ready(url)
