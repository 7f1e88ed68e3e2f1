"""Real SGLang servers for the tests of this folder: each starts once a session, when a test first asks for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from monologue.backends.base import Picture, Prompt
from monologue.backends.hf import HFBackend
from monologue.backends.serving.launch import Server, launch, lora_flags
from monologue.backends.sglang import SGLangBackend
from monologue.cli import main
from monologue.seating import starter
from monologue.traces.store import RunReader
from tests_real.served.kit import PYTHON, Connect, Start


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server for a starter policy, or a folder; all are stopped at the end."""
    assert PYTHON.is_file(), "SGLang is not installed; run tests_real/install_sglang.sh (make test-sglang does)"
    logs, started = tmp_path_factory.mktemp("logs"), list[Server]()

    def one(role: str, *flags: str, port: int | None = None, **more: Any) -> Server:
        log = logs / f"{Path(role).name}-{len(started)}.log"
        started.append(
            launch(
                role if Path(role).is_absolute() else str(starter(role)),
                python=str(PYTHON),
                device="cpu",
                log=log,
                port=port,
                flags=flags,
                **more,
            )
        )
        return started[-1]

    yield one
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def servers(start: Start) -> dict[str, Server]:
    """A server for each starter policy. Nobody harms them."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(("questioner", "answerer"), pool.map(start, ("questioner", "answerer")), strict=True))


@pytest.fixture(scope="session")
def second(start: Start) -> Server:
    """Another questioner, which takes adapters. Tests may stop it, and go on with it afterwards."""
    return start("questioner", *lora_flags(8, "cpu"))


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes clients, which are closed whatever comes of the test."""
    made = list[SGLangBackend]()

    def one(*servers: Server | str, **options: float) -> SGLangBackend:
        urls = (server if isinstance(server, str) else server.url for server in servers)
        made.append(SGLangBackend(*urls, **options))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for client in made:
        await client.aclose()


@pytest.fixture
async def local() -> AsyncIterator[Callable[..., HFBackend]]:
    """Makes in-process engines, which are closed whatever comes of the test."""
    made = list[HFBackend]()

    def one(source: str | Path) -> HFBackend:
        made.append(HFBackend(source))
        return made[-1]

    yield one
    for engine in made:
        await engine.aclose()


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Prompt]]:
    """Prompts of each role as they stand in dialogues of the oracle, at least 250."""
    run = tmp_path_factory.mktemp("parity") / "run"
    words = ["play", "--questioner", "oracle", "--answerer", "oracle", "--split", "validation", "--n", "250", "--out", str(run)]
    assert main(words) == 0
    reader, found = RunReader(run), {"questioner": list[Prompt](), "answerer": list[Prompt]()}
    for call in (call for episode in reader.episodes() for call in episode.calls()):
        pictures = tuple(Picture(image.sha256, reader.picture(image.sha256)) for image in call.images)
        found[call.role].append(Prompt(call.prompt_ids, pictures, call.episode_id))
    assert min(map(len, found.values())) >= 250
    return found
