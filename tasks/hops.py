"""The hops world: a picture of twelve labelled cells in which every answer takes more serial look-ups than a shallow model has layers.

A cell shows its own letter, an arrow to another letter, and a colour. ``which colour is 3 hops after c`` follows three arrows from the
cell c and names the colour found there: three look-ups whose key is the answer before, and one for the colour. The arrows make one ring
through all cells, so every other cell is as likely an end as any, none is visited twice, and no statistic of the picture helps who does
not walk. Each colour stands on two cells, and the six of them are always the choices, so a guesser has one in six (two in eleven, knowing
that the start is not the end). The picture is drawn from a seed: train, validation and test never share one.

The oracle monologue asks for one hop a turn, ``what follows c``, then for the colour. Questions end with the letter that they ask about:
what a tiny model has read last, it looks up with one circuit. One cell is 28 pixels: one visual token of a Qwen2-VL with patches of 14
pixels merged two by two.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageChops

from monologue.tasks.base import OracleTurn, Problem, exact_match
from monologue.tasks.generated import Generated

SPLITS = ("train", "validation", "test")
ROWS, COLUMNS, CELL = 3, 4, 28
COLOURS = {
    "red": (196, 40, 44),
    "orange": (226, 122, 24),
    "green": (34, 134, 58),
    "blue": (40, 76, 196),
    "purple": (124, 48, 156),
    "grey": (112, 112, 116),
}
LETTERS = {
    "a": (0b010, 0b101, 0b111, 0b101, 0b101),
    "c": (0b111, 0b100, 0b100, 0b100, 0b111),
    "e": (0b111, 0b100, 0b110, 0b100, 0b111),
    "f": (0b111, 0b100, 0b110, 0b100, 0b100),
    "h": (0b101, 0b101, 0b111, 0b101, 0b101),
    "j": (0b001, 0b001, 0b001, 0b101, 0b111),
    "l": (0b100, 0b100, 0b100, 0b100, 0b111),
    "p": (0b111, 0b101, 0b111, 0b100, 0b100),
    "t": (0b111, 0b010, 0b010, 0b010, 0b010),
    "u": (0b101, 0b101, 0b101, 0b101, 0b111),
    "x": (0b101, 0b101, 0b010, 0b101, 0b101),
    "z": (0b111, 0b001, 0b010, 0b100, 0b111),
}
"""Five rows of three dots each, drawn by us so that every machine draws the same pixels."""
ARROW = (0b000100, 0b000110, 0b111111, 0b000110, 0b000100)
INK = (250, 250, 250)
FAMILIES = {f"hop{hops}": hops for hops in range(1, 7)}
"""Arrows to follow; six, a colour and a conclusion are the eight turns that a dialogue has by default."""
USUAL = ("hop1", "hop2", "hop3", "hop4")
"""What the shipped policies were taught; longer ways are asked for by name."""
ASKED = ("which", "what", "colour", "is", "hop", "hops", "after", "follows")
CORRECTIONS = ("please", "look", "or", "answer", "again", "no", ",", "describe", "the", "picture")
"""What seats are told that said something unheard of, and what graph ``caption`` asks."""
VOCABULARY = (*LETTERS, *COLOURS, *map(str, range(10)), *ASKED, *CORRECTIONS)
"""Every word that this world says or hears."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one cell shows."""

    letter: str
    """Its own."""
    follows: str
    """The letter after the arrow."""
    colour: str
    """Of its ground."""


Board = tuple[Cell, ...]
"""Twelve cells in reading order."""


def draw_board(rng: random.Random) -> Board:
    """A ring through all letters, laid out at random."""
    ring = rng.sample(tuple(LETTERS), len(LETTERS))
    after = dict(zip(ring, (*ring[1:], ring[0]), strict=True))
    places = rng.sample(ring, len(ring))
    grounds = rng.sample((*COLOURS, *COLOURS), len(ring))
    return tuple(Cell(letter, after[letter], colour) for letter, colour in zip(places, grounds, strict=True))


def walk(board: Board, start: str, hops: int) -> tuple[Cell, ...]:
    """The cells on the way, first and last included."""
    cells = {cell.letter: cell for cell in board}
    way = [cells[start]]
    for _ in range(hops):
        way.append(cells[way[-1].follows])
    return tuple(way)


def paint(board: Board, seed: int) -> Image.Image:
    """The board as an RGB picture of 112 x 84 pixels: jittered letters, uneven grounds, pixel noise. Same board and seed, same pixels."""
    rng = random.Random(seed)
    canvas = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL))
    for place, cell in enumerate(board):
        left, top = place % COLUMNS * CELL, place // COLUMNS * CELL
        ground = tuple(max(0, min(255, value + rng.randint(-14, 14))) for value in COLOURS[cell.colour])
        canvas.paste(ground, (left + 1, top + 1, left + CELL, top + CELL))
        middle = top + 14 + rng.randint(-1, 1)
        _stamp(canvas, _letter(cell.letter, 3), left + rng.randint(2, 4), top + 5 + rng.randint(-1, 2))
        _stamp(canvas, _mask(ARROW, 6, 1), left + 14, middle - 2)
        _stamp(canvas, _letter(cell.follows, 2), left + 21, middle - 5 + rng.randint(-2, 2))
    grain = Image.frombytes("RGB", canvas.size, rng.randbytes(canvas.width * canvas.height * 3))
    return ImageChops.subtract(canvas, grain.point([value * 13 // 256 for value in range(256)] * 3))


def _stamp(canvas: Image.Image, mask: Image.Image, x: int, y: int) -> None:
    canvas.paste(INK, (x, y), mask)


def _letter(letter: str, dot: int) -> Image.Image:
    return _mask(LETTERS[letter], 3, dot)


@cache
def _mask(rows: tuple[int, ...], wide: int, dot: int) -> Image.Image:
    """Rows of bits as a mask, each dot a square of so many pixels."""
    bits = bytes(255 * (row >> (wide - 1 - column) & 1) for row in rows for column in range(wide))
    return Image.frombytes("L", (wide, len(rows)), bits).resize((wide * dot, len(rows) * dot), Image.Resampling.NEAREST)


class Drawing:
    """A picture that is painted when it is asked for."""

    __slots__ = ("board", "seed")

    def __init__(self, board: Board, seed: int) -> None:
        self.board, self.seed = board, seed

    def __call__(self) -> Image.Image:
        return paint(self.board, self.seed)


class Hops(Generated):
    """Colours some arrows away."""

    name = "hops"
    splits = SPLITS
    known = FAMILIES
    usual = USUAL

    def problem(self, split: str, index: int, seed: int = 0) -> Problem:
        """Problem ``index`` of a split; it depends on (seed, split, family, index) only."""
        family = self.families[index % len(self.families)]
        hops = FAMILIES[family]
        rng = random.Random(f"hops/{seed}/{split}/{family}/{index}")
        board = draw_board(rng)
        way = walk(board, rng.choice(board).letter, hops)
        turns = [OracleTurn(f"what follows {cell.letter}", cell.follows) for cell in way[:-1]]
        turns.append(OracleTurn(f"what colour is {way[-1].letter}", way[-1].colour))
        return Problem(
            id=f"{self._world}/{split}/{seed}/{index}",
            task=self.name,
            question=f"which colour is {hops} hop{'s' * (hops > 1)} after {way[0].letter}",
            choices=tuple(COLOURS),
            gold=tuple(COLOURS).index(way[-1].colour),
            pictures=(Drawing(board, rng.getrandbits(32)),),
            family=family,
            hops=hops + 1,
            oracle=tuple(turns),
            extra={
                "cells": [[cell.letter, cell.follows, cell.colour] for cell in board],
                "way": [board.index(cell) for cell in way],
            },
        )

    def score(self, problem: Problem, answer: str | None) -> float:
        return exact_match(problem, answer)
