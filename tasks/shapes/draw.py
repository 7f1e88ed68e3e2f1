"""A scene painted with Pillow: drawn four times too large and averaged down, so that edges are anti-aliased.

Nuisances that carry no answer: a tinted, uneven background, faint strokes and specks between the objects, jitter of place, size and
angle (below 14 degrees, since a square on its tip is a diamond), shifted hues, pixel noise. All come from the seed.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageChops, ImageDraw

from monologue.tasks.shapes.scene import COLUMNS, ROWS, Scene, Thing

CELL = 28
SIDE = 3 * CELL
SCALE = 4
"""Oversampling before the averaging."""

RGB = {
    "red": (216, 36, 40),
    "orange": (244, 130, 22),
    "yellow": (236, 208, 30),
    "green": (36, 158, 62),
    "cyan": (38, 196, 208),
    "blue": (36, 76, 214),
    "purple": (128, 44, 168),
    "pink": (244, 134, 188),
}
RADIUS = {"small": 6.6, "large": 11.2}
"""Pixels from the centre to the farthest point."""

Point = tuple[float, float]

_STAR = [(math.pi / 5 * k, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
_CROSS = [(-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32)]
_CROSS += [(-x, -y) for x, y in _CROSS]
_OUTLINE: dict[str, list[Point]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0, -1.05), (0.72, 0), (0, 1.05), (-0.72, 0)],
    "star": [(r * math.sin(a) * 1.08, -r * math.cos(a) * 1.08) for a, r in _STAR],
    "cross": [(0.92 * x, 0.92 * y) for x, y in _CROSS],
    "circle": [(0.9 * math.cos(math.pi / 20 * k), 0.9 * math.sin(math.pi / 20 * k)) for k in range(40)],
}


def paint(scene: Scene, seed: int) -> Image.Image:
    """The scene as an RGB picture of 84 x 84 pixels. Same scene and seed, same pixels."""
    rng = random.Random(seed)
    tint = tuple(rng.randint(232, 255) for _ in range(3))
    canvas = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), tint)
    pen = ImageDraw.Draw(canvas)
    _clutter(pen, rng)
    for cell, thing in scene.items():
        _paint_thing(pen, cell, thing, rng)
    return _noise(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), rng)


def _clutter(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """Faint strokes and specks."""
    for _ in range(rng.randint(2, 5)):
        shade = tuple(rng.randint(205, 240) for _ in range(3))
        start, end = ((rng.uniform(0, SIDE) * SCALE, rng.uniform(0, SIDE) * SCALE) for _ in range(2))
        pen.line([start, end], fill=shade, width=rng.randint(2, 5))
    for _ in range(rng.randint(3, 9)):
        x, y = rng.uniform(0, SIDE) * SCALE, rng.uniform(0, SIDE) * SCALE
        r = rng.uniform(1.5, 4)
        pen.ellipse([x - r, y - r, x + r, y + r], fill=tuple(rng.randint(150, 225) for _ in range(3)))


def _paint_thing(pen: ImageDraw.ImageDraw, cell: str, thing: Thing, rng: random.Random) -> None:
    radius = RADIUS[thing.size] * rng.uniform(0.92, 1.05) * SCALE
    slack = CELL * SCALE / 2 - radius * 1.1
    x = (COLUMNS.index(cell[1]) + 0.5) * CELL * SCALE + rng.uniform(-1, 1) * min(slack, 3 * SCALE)
    y = (ROWS.index(cell[0]) + 0.5) * CELL * SCALE + rng.uniform(-1, 1) * min(slack, 3 * SCALE)
    angle = math.radians(rng.uniform(-14, 14))
    cos, sin = math.cos(angle), math.sin(angle)
    outline = [(x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos)) for px, py in _OUTLINE[thing.shape]]
    colour = tuple(max(0, min(255, value + rng.randint(-18, 18))) for value in RGB[thing.colour])
    if thing.fill == "solid":
        pen.polygon(outline, fill=colour)
    else:
        pen.line([*outline, *outline[:2]], fill=colour, width=round(1.9 * SCALE), joint="curve")


def _noise(image: Image.Image, rng: random.Random) -> Image.Image:
    """Adds pixel noise of a few grey levels."""
    grain = Image.frombytes("RGB", image.size, rng.randbytes(image.width * image.height * 3)).point([v * 13 // 256 for v in range(256)] * 3)
    return ImageChops.subtract(image, grain)
