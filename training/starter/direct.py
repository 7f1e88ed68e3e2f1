"""The rival of the monologue: one VLM that answers a whole problem in one shot.

It is given every advantage that can be given: the finished answerer to start from, as many parameters as questioner and answerer together
(extra layers whose output projections start at zero, so that they change nothing at first), one-hop practice kept up in a share of its
rows, at least the same number of pictures and processor seconds. Without that start and that practice (``direct-plain``) it stays far
below.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from monologue.tasks.base import Problem
from monologue.tasks.shapes import Shapes
from monologue.tasks.shapes.draw import paint
from monologue.tasks.shapes.perception import KINDS
from monologue.training.starter.batches import TRAIN, Batch, Part, Words, interview, patches, picture_words
from monologue.training.starter.fit import Curve, Stage, fit
from monologue.training.starter.models import build_answerer
from monologue.training.starter.questioner import options
from monologue.training.starter.sight import Sight


def grow(start: Path, layers: int, seed: int, tokenizer: Any) -> Any:
    """The perception checkpoint with further layers on top; same function at first."""
    source: Any = Qwen2VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    model = build_answerer(seed, tokenizer, layers)
    report = model.load_state_dict(source.state_dict(), strict=False)
    fresh = {key for key in report.missing_keys if ".layers." not in key}
    if report.unexpected_keys or fresh:
        raise ValueError(f"the checkpoint {str(start)!r} is no answerer of this family: {sorted(fresh) or report.unexpected_keys}")
    for layer in model.model.language_model.layers[source.config.text_config.num_hidden_layers :]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def one_shot(problem: Problem) -> list[Part]:
    assert problem.gold is not None
    question = f"<bos> <user> {picture_words()} {problem.question} {options(problem)} <assistant>"
    return [(question, False), (f"{problem.choices[problem.gold]} <eos>", True)]


def practice(words: Words, stage: Stage, seed: int) -> Iterator[Batch]:
    """Whole problems, with a share of one-hop interviews (``stage.weights["interview"]``)."""
    rng = random.Random(f"direct/{seed}" + (f"/{stage.first}" if stage.first else ""))
    task = Shapes()
    share = (stage.weights or {}).get("interview", 0.0)
    for start in itertools.count(stage.first, stage.batch):
        rows, images = [], []
        for index in range(start, start + stage.batch):
            problem = task.problem("train", index, seed)
            scene = problem.pictures[0].scene  # type: ignore[attr-defined]
            if rng.random() < share:
                rows.append(interview(rng, scene, TRAIN, rng.choices(tuple(KINDS), k=stage.turns)))
            else:
                rows.append(one_shot(problem))
            images.append(paint(scene, rng.getrandbits(32)))
        yield Batch(*words.batch(rows), patches(images))


def learn(sight: Sight, stage: Stage, seed: int, curve: Curve) -> None:
    stream = practice(sight.words, stage, seed)
    fit(stage, sight.language(), stream, sight.speak_loss, curve, lambda: examine(sight, 300))


@torch.no_grad()
def examine(sight: Sight, n: int) -> dict[str, float]:
    """Accuracy on validation problems, all families and each."""
    sight.eval()
    task, table = Shapes(), {}
    for family in task.families:
        right = total = 0
        problems = list(Shapes([family]).problems("validation", n // len(task.families)))
        for start in range(0, len(problems), 100):
            some = problems[start : start + 100]
            batch = Batch(*sight.words.batch([one_shot(p) for p in some]), patches([p.pictures[0]() for p in some]))
            assert batch.pixels is not None
            logits, labels = sight.spoken(batch, sight.visual_tokens(batch.pixels))
            hit = (logits.argmax(-1) == labels).view(-1, 2).all(-1)
            right, total = right + int(hit.sum()), total + len(hit)
        table[family] = round(right / total, 4)
    sight.train()
    return {"accuracy": round(sum(table.values()) / len(table), 4), **table}
