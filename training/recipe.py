"""Recipes: TOML files whose first comment is their command. Settings on the command line override keys that the recipe has."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be read or followed."""


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe of ours by name, or a TOML file. Raises RecipeError."""
    path = RECIPES / f"{name}.toml" if (RECIPES / f"{name}.toml").is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {name!r}; give a TOML file or one of {known}")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name!r} is no TOML recipe: {error}") from error


Settings = TypeVar("Settings", bound=BaseModel)


def follow(settings: type[Settings], recipe: dict[str, Any], stage: str) -> Settings:
    """The recipe as the settings of a stage. Raises RecipeError that names the keys at fault."""
    try:
        return settings.model_validate(recipe)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r}" for one in error.errors())
        raise RecipeError(f"the recipe does not fit the stage {stage!r}: {faults}") from error


def override(recipe: dict[str, Any], settings: Sequence[str], known: Collection[str] = ()) -> dict[str, Any]:
    """``key=value`` settings over top-level keys; values are TOML. Raises RecipeError for keys that are neither in the recipe nor known."""
    for setting in settings:
        key, value = (part.strip() for part in setting.partition("=")[::2])
        if key not in {*recipe, *known} or not value:
            raise RecipeError(f"expected KEY=VALUE with a key of {sorted({*recipe, *known})}, got {setting!r}")
        try:
            recipe = {**recipe, **tomllib.loads(f"{key} = {value}")}
        except tomllib.TOMLDecodeError:
            raise RecipeError(f"expected a TOML value in {setting!r}; text wants quotes: --set '{key}=\"{value}\"'") from None
    return recipe
