"""A question's meaning as a program for a small stack machine, executed on a scene.

An instruction is a tuple of strings. Look-ups read the picture and cost one hop each; the others are thought without looking:

    look-ups   where WISH    push the cell of the one object that fulfils the wish
               at ATTRIBUTE  pop a cell, push the attribute of the object there
               count WISH    push how many objects fulfil the wish
               count-of ATTRIBUTE   pop a value, push how many objects have it
               exists WISH   push yes or no
               value ATTRIBUTE WISH push the attribute of the one object that fulfils the wish
    thinking   cell NAME     push a cell            step DIRECTION   pop a cell, push its neighbour
               either A B    pop yes or no, push cell A or B
               add, compare, same    pop two values, push their sum; more, fewer or equal; yes or no

A wish is written as pairs, ``("where", "colour", "red", "shape", "star")``. The run yields the oracle monologue: each look-up's
question and true reply. A program that asks for something absent or ambiguous is invalid on that scene (``None``).
"""

from __future__ import annotations

from dataclasses import dataclass

from monologue.tasks.base import OracleTurn
from monologue.tasks.shapes import language
from monologue.tasks.shapes.scene import Scene, Wish, cells_of, neighbour

Instruction = tuple[str, ...]
Program = tuple[Instruction, ...]
LOOKUPS = frozenset({"where", "at", "count", "count-of", "exists", "value"})
WEIGHINGS = {"add": "plus", "compare": "and", "same": "and"}
"""Thoughts over two values, and the word between them when they are said."""


class Invalid(Exception):
    """The program does not fit this scene."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program found, and the look-ups on the way."""

    value: str
    """The answer."""
    turns: tuple[OracleTurn, ...]
    """The look-ups with their true replies."""
    explanation: str = ""
    """What the last thought weighed, e.g. ``red and blue``; empty where the answer was simply seen."""


def wish(*pairs: str) -> Wish:
    """``wish("colour", "red")`` is ``{"colour": "red"}``."""
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def flat(wanted: Wish) -> tuple[str, ...]:
    """The inverse of ``wish``."""
    return tuple(part for pair in wanted.items() for part in pair)


def hops(program: Program) -> int:
    return sum(instruction[0] in LOOKUPS for instruction in program)


def run(program: Program, scene: Scene) -> Outcome | None:
    """Executes the program; None where it does not fit the scene."""
    stack: list[str] = []
    turns: list[OracleTurn] = []
    explanation = ""
    try:
        for name, *args in program:
            if name in LOOKUPS:
                turns.append(_look(name, args, stack, scene))
                stack.append(turns[-1].reply)
            else:
                if name in WEIGHINGS:
                    explanation = f"{stack[-2]} {WEIGHINGS[name]} {stack[-1]}"
                stack.append(_think(name, args, stack))
    except Invalid:
        return None
    return Outcome(stack.pop(), tuple(turns), explanation)


def _only(scene: Scene, wanted: Wish) -> str:
    cells = cells_of(scene, wanted)
    if len(cells) != 1:
        raise Invalid
    return cells[0]


def _look(name: str, args: list[str], stack: list[str], scene: Scene) -> OracleTurn:
    if name == "where":
        wanted = wish(*args)
        return OracleTurn(language.ask_where(wanted), _only(scene, wanted))
    if name == "at":
        cell = stack.pop()
        if cell not in scene:
            raise Invalid
        return OracleTurn(language.ask_at(args[0], cell), str(getattr(scene[cell], args[0])))
    if name == "value":
        attribute, wanted = args[0], wish(*args[1:])
        reply = str(getattr(scene[_only(scene, wanted)], attribute))
        return OracleTurn(language.ask_attribute(attribute, wanted), reply)
    wanted = {args[0]: stack.pop()} if name == "count-of" else wish(*args)
    found = len(cells_of(scene, wanted))
    if name == "exists":
        return OracleTurn(language.ask_exists(wanted), "yes" if found else "no")
    return OracleTurn(language.ask_count(wanted), str(found))


def _think(name: str, args: list[str], stack: list[str]) -> str:
    if name == "cell":
        return args[0]
    if name == "step":
        beyond = neighbour(stack.pop(), args[0])
        if beyond is None:
            raise Invalid
        return beyond
    if name == "either":
        return args[0] if stack.pop() == "yes" else args[1]
    second, first = stack.pop(), stack.pop()
    if name == "add":
        return str(int(first) + int(second))
    if name == "compare":
        return "equal" if first == second else "more" if int(first) > int(second) else "fewer"
    if name == "same":
        return "yes" if first == second else "no"
    raise ValueError(f"unknown instruction {name!r}; expected one of the names in this module's docstring")
