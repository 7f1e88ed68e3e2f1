"""Ten question families of one to four hops whose answer cannot be guessed from the question.

Order matters: question, choices and gold are drawn first, gold uniformly among the choices, and only then is a picture sought in
which the program gives that answer. So P(gold | question, choices) is exactly 1 / len(choices) for whoever has not seen the picture.
Seeking the picture first and reading the answer off it leaves the natural frequencies in ("no" is commoner than "yes"), and drawing
gold again on every attempt lets them back in.

Distractors are colours and shapes that are in the picture too, and windows of four neighbouring numbers, so that ruling out what is
absent does not help much.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from monologue.tasks.base import TaskError
from monologue.tasks.shapes import language
from monologue.tasks.shapes.programs import Instruction, Outcome, Program, flat, run
from monologue.tasks.shapes.scene import ATTRIBUTES, CELLS, COLOURS, STEPS, Thing, Wish, draw_scene, neighbour

Pairs = tuple[tuple[str, str], ...]
Wishes = dict[str, Wish]
ATTEMPTS = 20_000


@dataclass(frozen=True, slots=True)
class Draft:
    """A question with its answer, before there is a picture."""

    question: str
    choices: tuple[str, ...]
    gold: int
    program: Program
    plant: Callable[[random.Random], Wishes | None]
    """Proposes objects that make the wanted answer likely; None where the proposal does not fit on the board."""
    colours: tuple[str, ...] = ()
    """Colours that the picture should draw from."""

    @property
    def answer(self) -> str:
        return self.choices[self.gold]


@dataclass(frozen=True, slots=True)
class World:
    """What a split may draw (``pairs``) and refer to (``refs``)."""

    pairs: Pairs
    refs: Pairs


def find_scene(rng: random.Random, draft: Draft, world: World) -> tuple[dict[str, Thing], Outcome]:
    """A picture in which the draft's program gives its answer. Raises TaskError when none turns up."""
    for _ in range(ATTEMPTS):
        wishes = draft.plant(rng)
        if wishes is None:
            continue
        others = [colour for colour in COLOURS if colour not in draft.colours]
        wanted = max(3, min(6, len(draft.colours) + rng.randint(0, 2)))
        palette = (*draft.colours, *rng.sample(others, max(0, wanted - len(draft.colours))))
        scene = draw_scene(rng, wishes, world.pairs, palette=palette)
        outcome = run(draft.program, scene)
        if outcome and outcome.value == draft.answer:
            return scene, outcome
    raise TaskError(f"no picture found for {draft.question!r} with answer {draft.answer!r} in {ATTEMPTS} attempts")


def _pair(rng: random.Random, pairs: Pairs) -> Wish:
    colour, shape = rng.choice(pairs)
    return {"colour": colour, "shape": shape}


def _options(rng: random.Random, values: tuple[str, ...], n: int = 4) -> tuple[tuple[str, ...], int]:
    return tuple(rng.sample(values, n)), rng.randrange(n)


def _numbers(rng: random.Random, lowest: int, highest: int) -> tuple[tuple[str, ...], int]:
    """A window of four neighbouring numbers in random order."""
    start = rng.randint(lowest, highest - 3)
    return _options(rng, tuple(str(start + k) for k in range(4)))


def _one_attribute(rng: random.Random, kind: str | None = None) -> Wish:
    kind = kind or rng.choice(("colour", "shape"))
    return {kind: rng.choice(ATTRIBUTES[kind])}


def _scatter(rng: random.Random, wishes: Sequence[Wish], taken: Wishes | None = None) -> Wishes | None:
    """Puts each wish on a free cell."""
    taken = dict(taken or {})
    free = [cell for cell in CELLS if cell not in taken]
    if len(wishes) > len(free):
        return None
    return {**taken, **dict(zip(rng.sample(free, len(wishes)), wishes, strict=True))}


def _chain_of(rng: random.Random, links: list[tuple[Wish, str, Wish]]) -> Wishes | None:
    """Cells for (reference, direction, neighbour's wish) links that do not collide."""
    wishes: Wishes = {}
    for ref, direction, beside in links:
        spots = [(c, n) for c in CELLS if (n := neighbour(c, direction)) and c not in wishes and n not in wishes]
        if not spots:
            return None
        cell, other = rng.choice(spots)
        wishes |= {cell: ref, other: beside}
    return wishes


def attribute(rng: random.Random, world: World) -> Draft:
    asked, given = rng.choice((("colour", "shape"), ("shape", "colour")))
    known = rng.choice(ATTRIBUTES[given])
    possible = tuple(sorted({c if asked == "colour" else s for c, s in world.refs if known in (c, s)}))
    if len(possible) < 2:
        return attribute(rng, world)
    choices, gold = _options(rng, possible, min(4, len(possible)))
    wanted = {given: known}
    return Draft(
        language.ask_attribute(asked, wanted),
        choices,
        gold,
        (("value", asked, *flat(wanted)),),
        lambda r: _scatter(r, [{**wanted, asked: choices[gold]}]),
        choices if asked == "colour" else (known,),
    )


def count(rng: random.Random, world: World) -> Draft:
    wanted = _one_attribute(rng)
    choices, gold = _numbers(rng, 0, 5)
    return Draft(
        language.ask_count(wanted),
        choices,
        gold,
        (("count", *flat(wanted)),),
        lambda r: _scatter(r, [wanted] * int(choices[gold])),
        tuple(v for k, v in wanted.items() if k == "colour"),
    )


def near(rng: random.Random, world: World) -> Draft:
    ref, direction, asked = _pair(rng, world.refs), rng.choice(tuple(STEPS)), rng.choice(("colour", "shape"))
    choices, gold = _options(rng, ATTRIBUTES[asked])
    return Draft(
        f"what {asked} is the object {direction} the {language.noun(ref)} ?",
        choices,
        gold,
        (("where", *flat(ref)), ("step", direction), ("at", asked)),
        lambda r: _chain_of(r, [(ref, direction, {asked: choices[gold]})]),
        tuple(dict.fromkeys([ref["colour"], *(choices if asked == "colour" else ())])),
    )


def branch(rng: random.Random, world: World) -> Draft:
    ref, asked = _pair(rng, world.refs), rng.choice(("colour", "shape"))
    yes, no = rng.sample(CELLS, 2)
    choices, gold = _options(rng, ATTRIBUTES[asked])
    there = rng.random() < 0.5
    lure = rng.choice([c for c in choices if c != choices[gold]])

    def plant(r: random.Random) -> Wishes | None:
        ends: Wishes = {yes: {asked: choices[gold]}, no: {asked: lure}} if there else {no: {asked: choices[gold]}, yes: {asked: lure}}
        return _scatter(r, [ref], ends) if there else ends

    return Draft(
        f"if there is a {language.noun(ref)} then what {asked} is at {yes} , or else at {no} ?",
        choices,
        gold,
        (("exists", *flat(ref)), ("either", yes, no), ("at", asked)),
        plant,
        tuple(dict.fromkeys([ref["colour"], *(choices if asked == "colour" else ())])),
    )


def compare(rng: random.Random, world: World) -> Draft:
    kind = rng.choice(("colour", "shape"))
    first, second = ({kind: value} for value in rng.sample(ATTRIBUTES[kind], 2))
    choices, gold = _options(rng, ("more", "fewer", "equal"), 3)

    def plant(r: random.Random) -> Wishes | None:
        high = r.randint(1, 4)
        low = r.randint(0, high - 1)
        a, b = {"more": (high, low), "fewer": (low, high), "equal": (min(high, 3),) * 2}[choices[gold]]
        return _scatter(r, [first] * a + [second] * b)

    return Draft(
        f"are there more or fewer {language.noun(first, True)} than {language.noun(second, True)} , or equal ?",
        choices,
        gold,
        (("count", *flat(first)), ("count", *flat(second)), ("compare",)),
        plant,
        tuple(value for value in (*first.values(), *second.values()) if value in COLOURS),
    )


def total(rng: random.Random, world: World) -> Draft:
    kind = rng.choice(("colour", "shape"))
    first, second = ({kind: value} for value in rng.sample(ATTRIBUTES[kind], 2))
    choices, gold = _numbers(rng, 0, 6)

    def plant(r: random.Random) -> Wishes | None:
        a = r.randint(0, int(choices[gold]))
        return _scatter(r, [first] * a + [second] * (int(choices[gold]) - a))

    return Draft(
        f"how many {language.noun(first, True)} plus {language.noun(second, True)} are there altogether ?",
        choices,
        gold,
        (("count", *flat(first)), ("count", *flat(second)), ("add",)),
        plant,
        tuple(value for value in (*first.values(), *second.values()) if value in COLOURS),
    )


def kin(rng: random.Random, world: World) -> Draft:
    """How many objects share the neighbour's colour or shape."""
    ref, direction, shared = _pair(rng, world.refs), rng.choice(tuple(STEPS)), rng.choice(("colour", "shape"))
    choices, gold = _numbers(rng, 1, 5)

    def plant(r: random.Random) -> Wishes | None:
        wanted = {shared: r.choice(ATTRIBUTES[shared])}
        own = ref[shared] == wanted[shared]
        more = int(choices[gold]) - 1 - own
        link = _chain_of(r, [(ref, direction, wanted)])
        return None if more < 0 or link is None else _scatter(r, [wanted] * more, link)

    return Draft(
        f"how many objects have the same {shared} as the object {direction} the {language.noun(ref)} ?",
        choices,
        gold,
        (("where", *flat(ref)), ("step", direction), ("at", shared), ("count-of", shared)),
        plant,
        (ref["colour"],),
    )


def match(rng: random.Random, world: World) -> Draft:
    """Whether the neighbour looks like the object in a named cell."""
    ref, direction, shared = _pair(rng, world.refs), rng.choice(tuple(STEPS)), rng.choice(("colour", "shape"))
    cell = rng.choice(CELLS)
    choices, gold = _options(rng, ("yes", "no"), 2)

    def plant(r: random.Random) -> Wishes | None:
        values = _two_values(r, shared, choices[gold] == "yes")
        link = _chain_of(r, [(ref, direction, {shared: values[0]})])
        return None if link is None or cell in link else {**link, cell: {shared: values[1]}}

    return Draft(
        f"has the object {direction} the {language.noun(ref)} the same {shared} as the object at {cell} ?",
        choices,
        gold,
        (("where", *flat(ref)), ("step", direction), ("at", shared), ("cell", cell), ("at", shared), ("same",)),
        plant,
        (ref["colour"],),
    )


def twins(rng: random.Random, world: World) -> Draft:
    """Whether two neighbours look alike: four look-ups."""
    first, second = (dict(zip(("colour", "shape"), pair, strict=True)) for pair in rng.sample(world.refs, 2))
    one, two, shared = rng.choice(tuple(STEPS)), rng.choice(tuple(STEPS)), rng.choice(("colour", "shape"))
    choices, gold = _options(rng, ("yes", "no"), 2)

    def plant(r: random.Random) -> Wishes | None:
        values = _two_values(r, shared, choices[gold] == "yes")
        return _chain_of(r, [(first, one, {shared: values[0]}), (second, two, {shared: values[1]})])

    leg: Callable[[Wish, str], tuple[Instruction, ...]]
    leg = lambda ref, way: (("where", *flat(ref)), ("step", way), ("at", shared))  # noqa: E731
    return Draft(
        f"has the object {one} the {language.noun(first)} the same {shared} as the object {two} the {language.noun(second)} ?",
        choices,
        gold,
        (*leg(first, one), *leg(second, two), ("same",)),
        plant,
        tuple(dict.fromkeys((first["colour"], second["colour"]))),
    )


def tally(rng: random.Random, world: World) -> Draft:
    """Objects that share the neighbour's colour or shape, plus objects of a named kind: four look-ups."""
    ref, direction = _pair(rng, world.refs), rng.choice(tuple(STEPS))
    shared, kind = rng.sample(("colour", "shape"), 2)
    other = {kind: rng.choice(ATTRIBUTES[kind])}
    least = 1 + (ref[kind] == other[kind])
    choices, gold = _numbers(rng, least, 6)

    def plant(r: random.Random) -> Wishes | None:
        link = _chain_of(r, [(ref, direction, {shared: (value := r.choice(ATTRIBUTES[shared]))})])
        more = r.randint(0, int(choices[gold]) - least)
        rest = int(choices[gold]) - least - more
        return None if link is None else _scatter(r, [{shared: value}] * more + [other] * rest, link)

    return Draft(
        f"how many objects have the same {shared} as the object {direction} the {language.noun(ref)} , "
        f"plus how many {language.noun(other, True)} are there ?",
        choices,
        gold,
        (("where", *flat(ref)), ("step", direction), ("at", shared), ("count-of", shared), ("count", *flat(other)), ("add",)),
        plant,
        tuple(dict.fromkeys([ref["colour"], *(v for v in other.values() if v in COLOURS)])),
    )


def _two_values(rng: random.Random, kind: str, alike: bool) -> tuple[str, str]:
    first, second = rng.sample(ATTRIBUTES[kind], 2)
    return (first, first) if alike else (first, second)


FAMILIES: Mapping[str, Callable[[random.Random, World], Draft]] = {
    f.__name__: f for f in (attribute, count, near, branch, compare, total, kin, match, twins, tally)
}
MULTI_HOP = tuple(name for name in FAMILIES if name not in ("attribute", "count"))
