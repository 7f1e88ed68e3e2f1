"""Whose folder it is, and where a killed training goes on.

A training that writes into the folder of another loses either: so what it was begun with is written down beside its result, ``--resume``
is refused where that is not the same to the last key, and a folder that holds somebody's work already is refused otherwise. The claim is
staked when all else has been checked, so that a recipe that fails at once leaves its folder to the mended one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monologue.training.recipe import RecipeError

STATE = "trainer"
"""Folder beside the result of what a resume needs."""
RECIPE = "recipe.json"
TAKEN = {"run.json": "a run of traces", "config.json": "a policy"}
"""Files that tell of other work."""


def claim(settled: Mapping[str, Any], out: Path, resume: bool) -> None:
    """Raises RecipeError where the folder holds other work, or where there is no training by ``settled`` to go on with."""
    file = out / RECIPE
    if resume and not file.is_file():
        raise RecipeError(f"expected a training in {str(out)!r} to go on with, found none; leave --resume out")
    if file.is_file():
        there = json.loads(file.read_text())
        if not resume:
            raise RecipeError(f"{str(out)!r} holds a training already; --resume goes on with it, or name another --out")
        if other := {key: (there.get(key, ""), value) for key, value in settled.items() if there.get(key, "") != value}:
            told = f"the training in {str(out)!r} has another recipe: {other!r} (there, here)"
            raise RecipeError(f"{told}; go on with it as it was begun, or name another --out")
    elif found := next((what for name, what in TAKEN.items() if (out / name).is_file()), None):
        raise RecipeError(f"expected a folder for a training, got {str(out)!r}, which holds {found}; name another --out")


def take(settled: Mapping[str, Any], out: Path) -> None:
    """Writes down whose folder this is."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE).write_text(json.dumps(settled, indent=1) + "\n")


def latest(folder: Path) -> Path | None:
    """The last checkpoint that was written whole (its state is written last); None where there is none."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if _whole(path / "trainer_state.json")), None)


def _whole(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text())["global_step"])
    except (FileNotFoundError, json.JSONDecodeError):
        return False
