"""The one-hop questions that an answerer practises on and is examined on, kind by kind.

    at      what colour | shape | size | fill is at b2 ?       the value, or nothing
    where   where is the red star ?                            a cell, or nowhere
    count   how many red objects are there ?                   a digit
    exists  is there a red star ?                              yes or no, half of each; "no" has red things and stars, unless rare
    value   what colour is the star ?                          the attribute of the one object that fits

In an examination every kind has its own pictures, and a question about an object names a pair of the split's ``refs``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from monologue.tasks.shapes import language
from monologue.tasks.shapes.families import World
from monologue.tasks.shapes.scene import ATTRIBUTES, CELLS, SEEN, Scene, Thing, Wish, cells_of, draw_scene


@dataclass(frozen=True, slots=True)
class Look:
    """A question about one picture with its true reply."""

    kind: str
    question: str
    reply: str


def ask_at(rng: random.Random, scene: Scene, world: World) -> Look | None:
    attribute = rng.choice(tuple(ATTRIBUTES))
    named = [cell for cell, thing in scene.items() if thing.pair in world.refs]
    if not named:
        return None
    cell = rng.choice(named) if rng.random() < 0.9 else rng.choice(CELLS)
    reply = str(getattr(scene[cell], attribute)) if cell in scene else language.NOTHING
    return Look("at", language.ask_at(attribute, cell), reply)


def _target(rng: random.Random, scene: Scene, world: World) -> Thing | None:
    """An object of the scene that the split may ask about."""
    things = [thing for thing in scene.values() if thing.pair in world.refs]
    return rng.choice(things) if things else None


def ask_where(rng: random.Random, scene: Scene, world: World) -> Look | None:
    if rng.random() < 0.1:
        colour, shape = rng.choice(world.refs)
        wish: Wish = {"colour": colour, "shape": shape}
        return None if cells_of(scene, wish) else Look("where", language.ask_where(wish), language.NOWHERE)
    thing = _target(rng, scene, world)
    if thing is None:
        return None
    names = rng.choices((("colour", "shape"), ("colour",), ("shape",)), (8, 1, 1))[0]
    wish = {name: getattr(thing, name) for name in names}
    cells = cells_of(scene, wish)
    return Look("where", language.ask_where(wish), cells[0]) if len(cells) == 1 else None


def ask_count(rng: random.Random, scene: Scene, world: World) -> Look | None:
    kind = rng.choice(("colour", "shape"))
    thing = _target(rng, scene, world)
    if thing is None:
        return None
    value = getattr(thing, kind) if rng.random() < 0.75 else rng.choice(ATTRIBUTES[kind])
    wish = {kind: value}
    return Look("count", language.ask_count(wish), str(len(cells_of(scene, wish))))


def ask_exists(rng: random.Random, scene: Scene, world: World) -> Look | None:
    thing = _target(rng, scene, world)
    if thing is None:
        return None
    if rng.random() < 0.5:
        return Look("exists", language.ask_exists({"colour": thing.colour, "shape": thing.shape}), "yes")
    colours = {t.colour for t in scene.values()}
    shapes = {t.shape for t in scene.values()}
    drawn = {t.pair for t in scene.values()}
    near = [p for p in world.refs if p not in drawn and (p[0] in colours and p[1] in shapes)]
    far = [p for p in world.refs if p not in drawn]
    colour, shape = rng.choice(near if near and rng.random() < 0.8 else far)
    return Look("exists", language.ask_exists({"colour": colour, "shape": shape}), "no")


def ask_value(rng: random.Random, scene: Scene, world: World) -> Look | None:
    thing = _target(rng, scene, world)
    if thing is None:
        return None
    asked = rng.choice(tuple(ATTRIBUTES))
    given = {"colour": ("shape",), "shape": ("colour",)}.get(asked, ("colour", "shape"))
    wish = {name: getattr(thing, name) for name in given}
    if len(cells_of(scene, wish)) != 1:
        return None
    return Look("value", language.ask_attribute(asked, wish), getattr(thing, asked))


KINDS: Mapping[str, Callable[[random.Random, Scene, World], Look | None]] = {
    "at": ask_at,
    "where": ask_where,
    "count": ask_count,
    "exists": ask_exists,
    "value": ask_value,
}


def look(rng: random.Random, scene: Scene, world: World, kind: str) -> Look | None:
    """One question of the kind about the scene; None where the scene admits none after a few tries."""
    for _ in range(4):
        found = KINDS[kind](rng, scene, world)
        if found is not None:
            return found
    return None


def practice_scene(rng: random.Random, pairs: tuple[tuple[str, str], ...] = SEEN) -> dict[str, Thing]:
    """A scene whose colours and shapes repeat more or less often, so that every count occurs."""
    wishes: dict[str, Wish] = {}
    if rng.random() < 0.6:
        kind = rng.choice(("colour", "shape"))
        value = rng.choice(ATTRIBUTES[kind])
        wishes = {cell: {kind: value} for cell in rng.sample(CELLS, rng.randint(2, 5))}
    return draw_scene(rng, wishes, pairs)


def exam(world: World, kind: str, n: int, seed: str) -> Iterator[tuple[Scene, Look]]:
    """``n`` scenes with one question each."""
    done = 0
    for index in range(100 * n):
        rng = random.Random(f"exam/{seed}/{kind}/{index}")
        scene = practice_scene(rng, world.pairs)
        found = look(rng, scene, world, kind)
        if found is not None:
            yield scene, found
            done += 1
        if done == n:
            return


def replies(look: Look) -> tuple[str, ...]:
    """Every word that could answer the question."""
    if look.kind == "exists":
        return ("yes", "no")
    if look.kind == "where":
        return (*CELLS, language.NOWHERE)
    if look.kind == "count":
        return tuple("01234567")
    attribute = look.question.split()[1]
    return (*ATTRIBUTES[attribute], *((language.NOTHING,) if look.kind == "at" else ()))
