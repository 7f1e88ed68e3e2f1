"""The wheel, as a stranger installs it: in an empty environment without torch, with nothing importable under a room's short name."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("agents", "backends", "graphs", "tasks", "traces", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_everything_under_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"monologue"}
    for room in ROOMS:
        assert f"monologue/{room}/__init__.py" in names and f"monologue/{room}/py.typed" in names
    for policy in ("questioner", "answerer", "direct", "speaker", "thinker"):
        assert f"monologue/backends/starter/{policy}/model.safetensors" in names
    for part in ("index.html", "app.js", "app.css", "htm-preact.js", "htm-preact.LICENSE"):
        assert f"monologue/traces/page/static/{part}" in names
    assert "monologue/training/recipes/answerer.toml" in names


def test_the_starter_weights_stay_under_ten_megabytes(wheel: Path) -> None:
    sizes = [info.file_size for info in zipfile.ZipFile(wheel).infolist() if info.filename.endswith(".safetensors")]
    assert len(sizes) == 5 and sum(sizes) < 10_000_000


def test_without_torch_the_light_rooms_import_and_the_heavy_door_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
    subprocess.run(install, check=True)
    code = """
import importlib.util, monologue, monologue.traces.recorder, monologue.tasks.shapes, monologue.graphs.play, monologue.backends.scripted
assert importlib.util.find_spec("torch") is None
for room in ("agents", "graphs", "backends", "tasks", "traces", "training"):
    assert importlib.util.find_spec(room) is None, room
print(next(monologue.tasks.shapes.Shapes().problems("test", 1)).question)
"""
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip().endswith("?")
    play = [python, "-m", "monologue", "play", "--n", "1", "--out", tmp_path / "run"]
    refused = subprocess.run(play, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "pip install 'monologue[train]'" in refused.stderr
    assert "Traceback" not in refused.stderr
