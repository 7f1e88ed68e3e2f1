"""Where checkpoints lie and what they are called: names that mean the same on another machine, and weights known by their content.

    starter:questioner     a policy that ships with the package, wherever that is installed
    org/name               a model on the Hub
    /models/final          a folder, written out in full, so that a run can be replayed from anywhere on the machine

A run that says only which folder a policy came from says little: folders are overwritten. So the version of weights that nobody has named
otherwise is ``base:`` and the beginning of their SHA-256 (of a Hub commit where the files are not at hand as a folder).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from monologue.backends.base import BackendError

STARTERS = Path(__file__).parent / "starter"
PREFIX = "starter:"
HABIT = "latent.json"
"""File beside the weights of a checkpoint that was taught to think (``backends.latent``)."""
UNKNOWN = "base"
"""Version of weights whose content is not known."""


def portable(source: str | Path) -> str:
    """The name under which a checkpoint stands in traces."""
    text = str(source)
    if text.startswith(PREFIX) or not os.path.isdir(text):  # unlike Path.is_dir, False for names that no system takes
        return text
    full = Path(text).resolve()
    return f"{PREFIX}{full.name}" if full.parent == STARTERS.resolve() else str(full)


def place(source: str | Path) -> str:
    """The folder or Hub name that a name stands for. Raises BackendError for a starter policy that does not ship."""
    text = str(source)
    if not text.startswith(PREFIX):
        return text
    folder = STARTERS / text.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(PREFIX + one.parent.name for one in STARTERS.glob("*/config.json")))
        raise BackendError(f"expected one of {known}, got {text!r}")
    return str(folder)


def short(source: str | Path) -> str:
    """A policy's name, as short as tells it from its neighbours: ``starter-questioner``, ``org/name``, ``runs/final``."""
    name = portable(source)
    if name.startswith(PREFIX):
        return name.replace(":", "-")
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def fingerprint(source: str | Path, config: Any = None) -> str:
    """Version of the weights in a checkpoint, by content."""
    folder = Path(place(source))
    digest, found = hashlib.sha256(), False
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        found = True
        with file.open("rb") as data:
            while block := data.read(1 << 22):
                digest.update(block)
    if found:
        return f"{UNKNOWN}:{digest.hexdigest()[:12]}"
    commit = getattr(config, "_commit_hash", None)
    return f"{UNKNOWN}:{commit[:12]}" if commit else UNKNOWN
