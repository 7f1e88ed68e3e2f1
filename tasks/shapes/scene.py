"""What is in a picture: objects with five attributes on a 3 x 3 board. Plain values, no pixels.

One board cell is 28 pixels wide, which is one visual token of a Qwen2-VL tower (patch 14, merge 2): real geometry at the smallest
size. That alignment helps on purpose; clutter, rotation, jitter and noise (``draw``) work against it.

Twelve of the 48 pairs of colour and shape are held out: they are never drawn and never named in the training splits, so the
``combos`` split asks whether an answerer composes attributes or remembers pairs. Each colour and each shape is seen in training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = ("small", "large")
FILLS = ("solid", "hollow")
ROWS, COLUMNS = "abc", "123"
CELLS = tuple(row + column for row in ROWS for column in COLUMNS)
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "fill": FILLS}
STEPS: Mapping[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""From an object to its neighbour: rows down, columns right."""

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = frozenset((c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if (i - j) % 4 == 0)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. Its place is the key under which a scene holds it."""

    colour: str
    shape: str
    size: str
    fill: str

    @property
    def pair(self) -> tuple[str, str]:
        return (self.colour, self.shape)


Scene = Mapping[str, Thing]
"""Cell name to object; empty cells are absent."""

Wish = Mapping[str, str]
"""Attributes that an object must have, e.g. ``{"colour": "red"}``."""


def neighbour(cell: str, direction: str) -> str | None:
    """The cell one step away, or None beyond the edge of the board."""
    down, right = STEPS[direction]
    row, column = ROWS.index(cell[0]) + down, COLUMNS.index(cell[1]) + right
    return ROWS[row] + COLUMNS[column] if 0 <= row < 3 and 0 <= column < 3 else None


def matches(thing: Thing, wish: Wish) -> bool:
    return all(getattr(thing, name) == value for name, value in wish.items())


def cells_of(scene: Scene, wish: Wish) -> list[str]:
    """Cells whose object has the wished attributes, in reading order."""
    return [cell for cell in CELLS if cell in scene and matches(scene[cell], wish)]


def draw_thing(rng: random.Random, wish: Wish, pairs: tuple[tuple[str, str], ...], palette: tuple[str, ...] = COLOURS) -> Thing:
    """A random object of the allowed pairs that fulfils the wish; colours come from the palette unless wished."""
    colours = (wish["colour"],) if "colour" in wish else palette
    allowed = [p for p in pairs if p[0] in colours and p[1] == wish.get("shape", p[1])]
    if not allowed:
        raise ValueError(f"no allowed pair of colour and shape fulfils {dict(wish)!r}")
    colour, shape = rng.choice(allowed)
    return Thing(colour, shape, wish.get("size") or rng.choice(SIZES), wish.get("fill") or rng.choice(FILLS))


def draw_scene(
    rng: random.Random,
    wishes: Mapping[str, Wish] | None = None,
    pairs: tuple[tuple[str, str], ...] = SEEN,
    count: int | None = None,
    palette: tuple[str, ...] | None = None,
) -> dict[str, Thing]:
    """A scene of four to seven objects (or ``count``) from a palette of three to six colours, so that colours repeat.

    ``wishes`` says which cells must hold which objects. Cells come out in reading order.
    """
    wishes = wishes or {}
    palette = palette or tuple(rng.sample(COLOURS, rng.randint(3, 6)))
    total = max(count or rng.randint(4, 7), len(wishes))
    free = [cell for cell in CELLS if cell not in wishes]
    chosen = [*wishes, *rng.sample(free, total - len(wishes))]
    things = {cell: draw_thing(rng, wishes.get(cell, {}), pairs, palette) for cell in chosen}
    return {cell: things[cell] for cell in CELLS if cell in things}


def as_plain(scene: Scene) -> dict[str, dict[str, str]]:
    """A scene as JSON-ready values."""
    return {cell: {f.name: getattr(thing, f.name) for f in fields(thing)} for cell, thing in scene.items()}
