"""Whose folder it is, and where a killed training goes on.

A training that writes into the folder of another loses either: so what it was begun with is written down beside its result, ``--resume``
is refused where that is not the same to the last key, and a folder that holds somebody's work already is refused otherwise. The claim is
staked when all else has been checked, and given up where a training fails before its first checkpoint, so that a recipe that fails at once
leaves its folder to the mended one. A training that was killed keeps it: ``--resume`` goes on there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monologue.training.recipe import RecipeError

STATE = "trainer"
"""Folder beside the result of what a resume needs."""
RECIPE = "recipe.json"
SPENT = "cpu_seconds.json"
"""File in STATE: processor seconds of all lives of a training so far."""
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


@contextmanager
def taken(settled: Mapping[str, Any], out: Path, *made: str) -> Iterator[None]:
    """Writes down whose folder this is. Where what follows fails and leaves no checkpoint to go on from, what it made is taken away again:
    the claim, ``STATE``, whatever is called as one of ``made``, and the folder. What was there before stays.
    """
    names = [name for name in (RECIPE, STATE, *made) if not (out / name).exists()]
    own = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE).write_text(json.dumps(settled, indent=1) + "\n")
    try:
        yield
    except Exception:
        if RECIPE in names and latest(out / STATE) is None:
            with suppress(OSError):  # another process may write there still; what failed is told, not this
                _away([out / name for name in names], out if own else None)
        raise


def _away(made: Sequence[Path], folder: Path | None) -> None:
    for path in made:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if folder is not None and not any(folder.iterdir()):
        folder.rmdir()


def latest(folder: Path) -> Path | None:
    """The last checkpoint that was written whole (its state is written last); None where there is none."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if _whole(path / "trainer_state.json")), None)


def _whole(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text())["global_step"])
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def spent(out: Path) -> float:
    """Processor seconds that earlier lives of the training in ``out`` noted; 0.0 where none did."""
    file = out / STATE / SPENT
    return float(json.loads(file.read_text())) if file.is_file() else 0.0


def spend(seconds: float, out: Path) -> None:
    """Notes the processor seconds of all lives so far."""
    part = out / STATE / f"{SPENT}.part"
    part.parent.mkdir(exist_ok=True)
    part.write_text(json.dumps(seconds))
    os.replace(part, out / STATE / SPENT)
