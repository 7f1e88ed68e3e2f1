"""The house keeps its plan: which room may import which, and that a wheel holds every room under one name."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "traces": set(),
    "tasks": set(),
    "backends": {"traces"},
    "agents": {"backends", "traces"},
    "graphs": {"agents", "backends", "tasks", "traces"},
    "training": {"backends", "tasks", "traces"},
    "monologue": {"agents", "backends", "graphs", "tasks", "traces", "training"},
}
LIGHT_FORBIDS = ("torch", "transformers", "langgraph")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inner = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(inner if inner[0] == "monologue" else ("monologue", *inner))


MODULES = {module_name(path): path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at whatever depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must use absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in MODULES else name.rpartition(".")[0] if name.rpartition(".")[0] in MODULES else name for name in found}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        names = imported(path)
        rooms = {name.split(".")[1] for name in names if name.startswith("monologue.") and name.split(".")[1] in MAY_IMPORT}
        extra = rooms - MAY_IMPORT[room] - {room}
        assert not extra, f"{path.relative_to(ROOT)} may not import {sorted(extra)}"
        short = {name.split(".")[0] for name in names} & (set(MAY_IMPORT) - {"monologue"})
        assert not short, f"{path.relative_to(ROOT)} must say monologue.{sorted(short)[0]}"


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {name: {other for other in imported(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    remaining = dict(edges)
    while leaves := [name for name, needs in remaining.items() if not needs & set(remaining)]:
        for name in leaves:
            del remaining[name]
    assert not remaining, f"import circle among {sorted(remaining)}"


def test_every_room_is_in_the_wheel_and_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {module_name(path) for room in MAY_IMPORT for path in (ROOT / room).rglob("__init__.py")}
    rooms -= {"monologue.backends.serving.cpu.sgl_kernel"}  # data: a stand-in on another interpreter's path
    assert rooms == set(settings["packages"]) == set(settings["package-dir"])
    for folder in settings["package-dir"].values():
        assert (ROOT / folder / "py.typed").is_file(), folder


def test_the_front_door_is_light() -> None:
    code = "import sys, monologue, monologue.traces, monologue.tasks.shapes; print([m for m in %r if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code % (LIGHT_FORBIDS,)], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
