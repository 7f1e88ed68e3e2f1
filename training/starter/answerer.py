"""The starter answerer, from nothing, in five steps that follow one another because each is slow without the one before.

    see       the picture tower alone: every visual token names its cell and what stands there (a Visual Words loss on the tied
              embeddings). No language model runs, so a quarter of a million pictures cost minutes.
    captions  the language model learns to read a named cell.
    locate    ... and to find a cell by content. Mixed in from the start this skill stays flat for thousands of steps.
    drill     the same density for counting, existence and attributes.
    ask       whole interviews in the words that the graphs use, all kinds of questions.

Tower and word embeddings stand still after ``see``. The visual tokens are written in the word embeddings; with tied embeddings that
kept learning, finding by content stayed near chance (0.2 after 150 s), with frozen ones single attributes reached 0.94 in 100 s.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from monologue.tasks.shapes.draw import paint
from monologue.tasks.shapes.perception import KINDS, exam
from monologue.tasks.shapes.task import WORLDS
from monologue.training.starter import batches
from monologue.training.starter.batches import Batch, Part, picture_words
from monologue.training.starter.fit import Curve, Stage, fit
from monologue.training.starter.sight import Sight


def learn(sight: Sight, stages: list[Stage], seed: int, curve: Curve) -> None:
    """Runs the curriculum; unknown stage names raise ValueError before anything is trained."""
    unknown = [stage.name for stage in stages if stage.name not in _STEPS]
    if unknown:
        raise ValueError(f"unknown stages {unknown!r}; expected some of {', '.join(_STEPS)}")
    for stage in stages:
        _STEPS[stage.name](sight, stage, seed, curve)


def see(sight: Sight, stage: Stage, seed: int, curve: Curve) -> None:
    stream = batches.pictures(f"see/{seed}", stage.batch)
    fit(stage, sight.tower(), stream, lambda pair: sight.see_loss(*pair), curve)


def captions(sight: Sight, stage: Stage, seed: int, curve: Curve) -> None:
    _drill(sight, stage, seed, curve, batches.CAPTIONS)


def locate(sight: Sight, stage: Stage, seed: int, curve: Curve) -> None:
    _drill(sight, stage, seed, curve, batches.LOCATIONS)


def drill(sight: Sight, stage: Stage, seed: int, curve: Curve) -> None:
    _drill(sight, stage, seed, curve, batches.ALL_DRILLS)


def _drill(sight: Sight, stage: Stage, seed: int, curve: Curve, kinds: Sequence[batches.Drill]) -> None:
    stream = batches.drills(f"{stage.name}/{seed}", sight.words, stage.batch, kinds)
    fit(stage, sight.language(), stream, sight.speak_loss, curve)


def ask(sight: Sight, stage: Stage, seed: int, curve: Curve) -> None:
    stream = batches.interviews(f"{stage.name}/{seed}", sight.words, stage.batch, stage.turns, stage.weights or {})
    fit(stage, sight.language(), stream, sight.speak_loss, curve, lambda: examine(sight, 200, "validation"))


_STEPS = {step.__name__: step for step in (see, captions, locate, drill, ask)}


def questions(split: str, kind: str, n: int, seed: str, words: batches.Words) -> Iterator[Batch]:
    """The exam as batches of single questions, each with its own picture."""
    items = list(exam(WORLDS[split], kind, n, seed))
    for start in range(0, len(items), 100):
        rows: list[list[Part]] = []
        images = []
        for index, (scene, look) in enumerate(items[start : start + 100], start):
            rows.append([(f"<bos> <user> {picture_words()} {look.question} <assistant>", False), (f"{look.reply} <eos>", True)])
            images.append(paint(scene, random.Random(f"exam/{seed}/{kind}/{index}/paint").getrandbits(32)))
        yield Batch(*words.batch(rows), batches.patches(images))


@torch.no_grad()
def examine(sight: Sight, n: int, seed: str) -> dict[str, Any]:
    """Share of first questions answered word for word, per kind, on seen and on held-out pairs."""
    sight.eval()
    table: dict[str, Any] = {}
    for split in ("validation", "combos"):
        for kind in KINDS:
            right = total = 0
            for batch in questions(split, kind, n, f"{seed}/{split}", sight.words):
                assert batch.pixels is not None
                logits, labels = sight.spoken(batch, sight.visual_tokens(batch.pixels))
                hit = (logits.argmax(-1) == labels).view(-1, 2).all(-1)  # a one-word reply and <eos>
                right, total = right + int(hit.sum()), total + len(hit)
            table[f"{split}/{kind}"] = round(right / total, 4)
    sight.train()
    return table
