"""The door of the shapes world: seeded splits, an endless stream, and frozen test sets that nobody can change unnoticed.

    train, validation, test   pictures and questions of the 36 seen pairs; the three draw from disjoint seeds
    combos                    references of the 12 pairs that training never draws or names, pictures of all pairs

Problem ``i`` of a split depends on (seed, split, i) only, so streams can be cut, resumed and shared between processes.
The frozen sets are problems 0..1999 of ``test`` and ``combos`` at seed 0; ``FROZEN`` holds the hash of their content, pixels included.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator

from PIL.Image import Image

from monologue.tasks.base import OracleTurn, Problem, TaskError, exact_match
from monologue.tasks.generated import Generated
from monologue.tasks.shapes.draw import paint
from monologue.tasks.shapes.families import FAMILIES, World, find_scene
from monologue.tasks.shapes.perception import KINDS, look, practice_scene, replies
from monologue.tasks.shapes.programs import hops
from monologue.tasks.shapes.scene import HELD_OUT, PAIRS, SEEN, Scene, as_plain

SPLITS = ("train", "validation", "test", "combos")
WORLDS = {split: World(SEEN, SEEN) for split in SPLITS} | {"combos": World(PAIRS, tuple(sorted(HELD_OUT)))}
FROZEN_SIZE = 2000


class Shapes(Generated):
    """Questions about coloured shapes on a 3 x 3 board."""

    name = "shapes"
    splits = SPLITS
    known = usual = FAMILIES

    def problem(self, split: str, index: int, seed: int = 0) -> Problem:
        family = self.families[index % len(self.families)]
        rng = random.Random(f"shapes/{seed}/{split}/{family}/{index}")
        draft = FAMILIES[family](rng, WORLDS[split])
        scene, outcome = find_scene(rng, draft, WORLDS[split])
        return Problem(
            id=f"{self._world}/{split}/{seed}/{index}",
            task=self.name,
            question=draft.question,
            choices=draft.choices,
            gold=draft.gold,
            pictures=(Drawing(scene, rng.getrandbits(32)),),
            family=family,
            hops=hops(draft.program),
            program=draft.program,
            oracle=outcome.turns,
            explanation=outcome.explanation,
            extra={"scene": as_plain(scene)},
        )

    def score(self, problem: Problem, answer: str | None) -> float:
        return exact_match(problem, answer)


class Looks:
    """The one-hop questions that a monologue is made of, kind by kind; the choices are all words that could answer."""

    name = "looks"
    splits = SPLITS

    def problems(self, split: str, n: int | None = None, seed: int = 0) -> Iterator[Problem]:
        """The first ``n`` questions, each with its own picture; endless where n is None. Kinds take turns."""
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r} of task 'looks'; choose from {', '.join(SPLITS)}")
        return (self.problem(split, i, seed) for i in (range(n) if n is not None else itertools.count()))

    def problem(self, split: str, index: int, seed: int = 0) -> Problem:
        kind = tuple(KINDS)[index % len(KINDS)]
        rng = random.Random(f"looks/{seed}/{split}/{index}")
        found = None
        while found is None:
            scene = practice_scene(rng, WORLDS[split].pairs)
            found = look(rng, scene, WORLDS[split], kind)
        choices = replies(found)
        return Problem(
            id=f"looks/{split}/{seed}/{index}",
            task=self.name,
            question=found.question,
            choices=choices,
            gold=choices.index(found.reply),
            pictures=(Drawing(scene, rng.getrandbits(32)),),
            family=kind,
            hops=1,
            oracle=(OracleTurn(found.question, found.reply),),
            extra={"scene": as_plain(scene)},
        )

    def score(self, problem: Problem, answer: str | None) -> float:
        return exact_match(problem, answer)


class Drawing:
    """A picture that is painted when it is asked for."""

    __slots__ = ("scene", "seed")

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.seed = scene, seed

    def __call__(self) -> Image:
        return paint(self.scene, self.seed)


def content_hash(problems: Iterator[Problem]) -> str:
    """SHA-256 over question, choices, gold, oracle and pixels of every problem, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        oracle = [(turn.question, turn.reply) for turn in problem.oracle or ()]
        digest.update(json.dumps([problem.id, problem.question, problem.choices, problem.gold, oracle]).encode())
        for picture in problem.pictures:
            digest.update(picture().tobytes())
    return digest.hexdigest()


FROZEN = {
    "test": "08d48916f519405fc3374663a15617676239f7743e8b67d67f330abacd767c91",
    "combos": "93149f5dfa58f7a14e045ad6c8985a1a833c374e54ef64c9906771defb46b042",
}
"""Hash of the first FROZEN_SIZE problems of the examined splits at seed 0."""
