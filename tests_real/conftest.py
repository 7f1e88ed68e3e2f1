"""Real servers for the tests that need them, started once a session in environments of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from monologue.backends.serving.launch import Server, launch
from monologue.seating import starter

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """The Python in which SGLang is installed."""
    assert PYTHON.is_file(), "SGLang is not installed; run tests_real/install_sglang.sh (make test-sglang does)"
    return str(PYTHON)


@pytest.fixture(scope="session")
def servers(sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A real SGLang server for each starter policy."""
    logs, started = tmp_path_factory.mktemp("logs"), dict[str, Server]()
    try:
        for role in ("questioner", "answerer"):
            started[role] = launch(str(starter(role)), python=sglang_python, device="cpu", log=logs / f"{role}.log")
        yield started
    finally:
        for server in started.values():
            server.stop()
