"""Exports need packages that most people do not: each is asked for when it is used, and a missing one is named with its install line."""

from __future__ import annotations

import importlib
from typing import Any


class ExportError(Exception):
    """A run that cannot be handed to another tool."""


def need(module: str, extra: str) -> Any:
    """The module. Raises ExportError, with what to install, where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        told = f"this needs the package of {error.name!r}, which is not installed; pip install 'monologue[{extra}]'"
        raise ExportError(told) from error
