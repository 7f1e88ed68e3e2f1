"""What a thinker's training leaves beside the weights: ``card.json``, as the starter policies have it."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from monologue.backends.checkpoints import Checkpoint
from monologue.backends.inputs import Inputs
from monologue.backends.latent import Habit
from monologue.backends.perception.ivtlr import LatentReasoner
from monologue.interference import exams_of
from monologue.tasks.base import Task
from monologue.training import causal
from monologue.training.latent import Latent
from monologue.training.starter.make import world_hash, write_card


def validated(checkpoint: Checkpoint, folder: Path, task: Task, count: int) -> dict[str, float]:
    """Share of validation problems answered right, greedily, in all and by family."""
    habit, inputs = Habit.load(folder), Inputs(checkpoint)
    thinking = causal.Thinking(LatentReasoner(checkpoint.model, habit.mode), habit, inputs.banned)
    problems = list(task.problems("validation", count))
    hits: list[bool] = []
    for exam in exams_of(checkpoint, inputs, problems):
        hits += causal.right(thinking, thinking.think(exam), [one.ending for one in exam.lessons])
    found: dict[str, list[bool]] = defaultdict(list)
    for problem, hit in zip(problems, hits, strict=True):
        found["all"].append(hit)
        found[problem.family].append(hit)
    return {name: round(sum(some) / len(some), 4) for name, some in found.items()}


def write_thinker_card(
    options: argparse.Namespace, recipe: Latent, checkpoint: Checkpoint, out: Path, task: Task, scores: dict[str, float], before: float
) -> dict[str, Any]:
    """Of a training by the command line; ``before`` are the processor seconds of its earlier lives, to which come this process's."""
    stages = [
        {"name": f"{stage} latent", "steps": steps, "batch": recipe.batch, "lr": recipe.lr} for stage, steps in enumerate(recipe.steps)
    ]
    changed = "".join(f" --set '{setting}'" for setting in options.set) + (f" --start {options.start}" if options.start else "")
    facts = {"policy": "thinker", "command": f"monologue train latent {options.recipe}{changed}", "seed": recipe.seed, "stage": stages}
    facts["world"] = world_hash(task)
    return write_card(out, facts, checkpoint.model, scores, before + time.process_time())
