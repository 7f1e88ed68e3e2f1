"""``monologue eval latent --controls``: what a thinker answers when its latent steps are interfered with, as tables and JSON.

For any checkpoint with ``latent.json`` and any task with gold answers. Exact match is of the whole reply, word for word.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from monologue.asked import check_writable, settle_latent
from monologue.output import write_json
from monologue.tables import table
from monologue.tasks.base import Problem, Task
from monologue.usage import UsageError

BATCH = 64


def evaluate_latent(options: argparse.Namespace, task: Task) -> int:
    """Prints the tables. Raises UsageError, BackendError, TaskError."""
    import torch

    from monologue.backends.checkpoints import open_checkpoint
    from monologue.backends.inputs import Inputs
    from monologue.backends.latent import Habit
    from monologue.backends.perception.ivtlr import LatentReasoner
    from monologue.backends.places import place, portable
    from monologue.seating import starter
    from monologue.training import causal

    settle_latent(options)
    check_writable(options.json)
    source = portable(starter("thinker") if options.thinker == "starter" else options.thinker)
    habit = Habit.load(place(source))
    fitting = causal.fitting(habit.mode)
    names = fitting if options.controls in (None, "all") else tuple(name.strip() for name in options.controls.split(","))
    if unknown := [name for name in names if name not in fitting]:
        raise UsageError(f"unknown controls {unknown!r} for this thinker; choose from {', '.join(fitting)}")
    checkpoint = open_checkpoint(source, device="cpu", dtype=torch.float32)
    inputs = Inputs(checkpoint)
    habit.check(inputs.vocabulary)
    problems = list(task.problems(options.split or "test", options.n or 1000, 0))
    exams = exams_of(checkpoint, inputs, problems)
    thinking = causal.Thinking(LatentReasoner(checkpoint.model, habit.mode), habit, inputs.banned, options.seed)
    rows = causal.controls(thinking, exams, names if options.controls else ("none",))
    chance = sum(1 / max(1, len(problem.choices)) for problem in problems) / len(problems)
    show(rows, chance)
    asked = {name: getattr(options, name) for name in ("task", "families", "split")}
    found = {"thinker": source, **asked, "chance": chance, "latents": habit.steps, "controls": rows}
    if options.controls:
        found |= {"probes": causal.probes(thinking, exams), "recall": causal.recall(thinking, exams)}
        show_states(found["probes"], found["recall"], exams)
    if options.json:
        write_json(options.json, found)
    return 0


def exams_of(checkpoint: Any, inputs: Any, problems: Sequence[Problem]) -> list[Any]:
    """Problems as a thinker is asked them, in batches; with the patches that they need, where the task says so."""
    import torch

    from monologue.backends.perception.prompts import prompts
    from monologue.training.causal import Exam
    from monologue.training.internalise import lesson
    from monologue.training.rationales import bare, of_problem
    from monologue.voices import voice_of

    voice, found = voice_of(checkpoint, inputs), []
    batches = math.ceil(len(problems) / BATCH)  # of even size, so that none is left alone: controls exchange thoughts within a batch
    for number in range(batches):
        some = problems[len(problems) * number // batches : len(problems) * (number + 1) // batches]
        lessons = [lesson(of_problem(one) if one.oracle or one.extra.get("steps") else bare(one), voice, inputs) for one in some]
        with torch.inference_mode():
            given = prompts(checkpoint.model, [one.asked for one in lessons])
        sizes = given.there.sum(1).tolist()  # patches that each prompt's pictures are seen in
        known = [one.extra.get("way", ()) if len(one.extra.get("cells", ())) == size else () for one, size in zip(some, sizes, strict=True)]
        found.append(Exam(given, lessons, known))
    return found


def show(rows: Sequence[dict[str, Any]], chance: float) -> None:
    """The controls."""
    lines = []
    for row in rows:
        told = f"the other's answer in {row['carried']:.3f} of {row['pairs']}" if "carried" in row else ""
        lines.append([row["control"], str(row["n"]), f"{row['accuracy']:.3f}", f"{row['stderr']:.3f}", f"{chance:.3f}", told])
    table(["latent steps", "n", "accuracy", "± stderr", "chance", ""], lines)


def show_states(probes: Sequence[dict[str, Any]], recall: Sequence[dict[str, Any]], exams: Sequence[Any]) -> None:
    """What states hold, or why that cannot be told, and what was read again."""
    states = sorted({row["state"] for row in probes})
    found = {(row["state"], row["finding"]): f"{row['accuracy']:.3f}" for row in probes}
    findings = sorted({row["finding"] for row in probes})
    if probes:
        table(["probe", *(f"finding {j}" for j in findings)], [[f"state {i}", *(found.get((i, j), "-") for j in findings)] for i in states])
    else:
        print(unprobed(exams))
    if recall:
        lines = [[str(row["step"]), f"{row['at']:.3f}", f"{row['by']:.3f}", f"{row['draw']:.3f}"] for row in recall]
        table(["step", "its needed patch read at it", "or before", "a fair draw"], lines)


def unprobed(exams: Sequence[Any]) -> str:
    """Why no probe was fitted."""
    from monologue.training.causal import LEAST

    told = sum(bool(one.gists) for exam in exams for one in exam.lessons)
    return f"no probes: expected {LEAST} or more problems that say what a step finds, each with that step taken, got {told} that say so"
