"""Files that a command writes: one clear sentence where they cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monologue.usage import UsageError


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}; name a file in a folder that you may write to") from error
