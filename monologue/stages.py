"""``monologue train``: one function a stage."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from monologue.tables import table
from monologue.usage import UsageError


def train(options: argparse.Namespace) -> int:
    """Trains a policy by a recipe. Raises UsageError."""
    if options.retokenize and options.stage != "imitate":
        raise UsageError(
            f"--retokenize puts words into ids that were never sampled: only 'imitate' learns from those, got {options.stage!r}"
        )
    if options.only and options.stage != "starter":
        raise UsageError(f"--only chooses stages of a starter policy's recipe, got it with {options.stage!r}")
    if options.resume and options.stage == "starter":
        raise UsageError(f"--resume goes on with 'imitate', 'reinforce' and 'latent', got it with {options.stage!r}")
    stages = {"starter": train_starter, "imitate": train_imitate, "reinforce": train_reinforce, "latent": train_latent}
    return stages[options.stage](options)


def train_starter(options: argparse.Namespace) -> int:
    """A starter policy from nothing."""
    from monologue.training.recipe import override, read_recipe
    from monologue.training.starter.make import choose, make

    recipe = override(read_recipe(options.recipe), options.set)
    if options.only:
        recipe = choose(recipe, options.only)
    if options.dry_run:
        print(json.dumps(recipe, indent=1))
        return 0
    out = options.out or Path("runs") / recipe["policy"]
    changed = "".join(f" --set '{setting}'" for setting in options.set) + (f" --only {' '.join(options.only)}" if options.only else "")
    changed += f" --start {options.start}" if options.start else ""
    card = make({**recipe, "command": f"monologue train starter {options.recipe}{changed}"}, out, options.start)
    table(["examination", "score"], [[name, f"{value:.4f}"] for name, value in card["validation"].items()])
    print(f"{card['parameters']} parameters, {card['cpu_seconds']} processor seconds, written to {out}")
    return 0


def train_imitate(options: argparse.Namespace) -> int:
    """Imitation of what a role said in a run."""
    from monologue.seating import starter
    from monologue.training.claims import claim
    from monologue.training.imitate import imitate
    from monologue.training.imitation import Imitation
    from monologue.training.recipe import override, read_recipe
    from monologue.training.rows import KEEP

    recipe = Imitation.read(override(read_recipe(options.recipe), options.set, Imitation.model_fields))
    if options.dry_run:
        print(recipe.model_dump_json(indent=1))
        return 0
    source = str(options.start or recipe.model)
    source = str(starter(recipe.role)) if source == "starter" else source
    out = options.out or Path("runs") / f"imitate-{recipe.role}"
    facts, run = recipe.model_dump(exclude={"run", "model", "keep", "policy"}), Path(recipe.run)
    if options.retokenize:
        claim(recipe.settled(), out, options.resume)
        run = _retokenised(run, out / "retokenised", recipe.role, source)
    report = imitate(run, source, out, keep=KEEP[recipe.keep], resume=options.resume, **facts)
    first, last = (report["curve"][end]["loss"] for end in (0, -1))
    print(f"{report['rows']} rows, {report['sampled']} sampled ids, loss {first:.3f} to {last:.3f}, written to {out}")
    print(f"play:  monologue play --{recipe.role} {out}")
    return 0


def _retokenised(run: Path, out: Path, role: str, source: str) -> Path:
    """The run in the student's ids, and a line about what was left out."""
    from monologue.agents.load import load_policy
    from monologue.retokenised import retokenise

    drift = retokenise(run, out, role, load_policy(source, role))
    lost = "".join(f"; left out: {count} x {cause}" for cause, count in drift.left_out.items())
    print(f"{drift.kept} episodes said again in the ids of {source}{lost}")
    return out


def train_reinforce(options: argparse.Namespace) -> int:
    """Reinforcement on outcome."""
    from monologue.commands import TASKS, named_task
    from monologue.rollouts import reinforce
    from monologue.training.recipe import RecipeError, override, read_recipe
    from monologue.training.reinforcement import Reinforcement

    recipe = Reinforcement.read(override(read_recipe(options.recipe), options.set, Reinforcement.model_fields))
    if options.start:
        recipe = recipe.model_copy(update={recipe.trained[0]: str(options.start)})
    if options.dry_run:
        print(recipe.model_dump_json(indent=1))
        return 0
    out = options.out or Path("runs") / "reinforced"
    if recipe.task not in TASKS:
        raise RecipeError(f"unknown task {recipe.task!r}; choose from {', '.join(sorted(TASKS))}")
    lines = reinforce(recipe, out, None if recipe.runs else named_task(recipe.task, recipe.families), resume=options.resume)
    shown = ("reward", "score", "kl", "entropy", "turns", "clipped", "examined")
    rows = [[name, *(f"{line[name]:.3f}" for line in (lines[0], lines[-1]))] for name in shown if name in lines[0] and name in lines[-1]]
    table(["measure", "first iteration", "last"], rows)
    print(f"look:  monologue view {out}")
    for role in recipe.trained:
        print(f"play:  monologue play --{role} {out / role}{_world(recipe.task, recipe.families)}")
    return 0


def _world(task: str, families: str) -> str:
    """What a command needs beside a policy, so that it plays the problems on which that was trained."""
    named = f" --task {task}" if task not in ("", "shapes") else ""
    return f"{named} --families {families}" if families else named


def train_latent(options: argparse.Namespace) -> int:
    """Progressive internalisation."""
    import torch

    from monologue.backends.checkpoints import open_checkpoint
    from monologue.cards import validated, write_thinker_card
    from monologue.commands import TASKS, named_task
    from monologue.seating import starter
    from monologue.tasks.corpora import CORPORA
    from monologue.training.claims import spent
    from monologue.training.latent import Latent, internalise
    from monologue.training.recipe import RecipeError, override, read_recipe
    from monologue.voices import lessons_of

    recipe = Latent.read(override(read_recipe(options.recipe), options.set, Latent.model_fields))
    if options.start is not None:
        if not options.start.is_dir():
            raise UsageError(f"expected the folder of a checkpoint after --start, got {str(options.start)!r}")
        recipe = recipe.model_copy(update={"model": str(options.start)})
    if recipe.task and recipe.task not in (*TASKS, *CORPORA):
        raise RecipeError(f"unknown task {recipe.task!r}; choose from {', '.join(sorted((*TASKS, *CORPORA)))}")
    if options.dry_run:
        print(recipe.model_dump_json(indent=1))
        return 0
    source = str(starter("questioner", task="hops")) if recipe.model == "starter" else recipe.model
    out = options.out or Path("runs") / "latent"
    checkpoint = open_checkpoint(source, device="cpu", dtype=torch.float32)
    before = spent(out) if options.resume else 0.0
    lines = internalise(recipe, checkpoint, lessons_of(recipe, checkpoint, named_task), out, resume=options.resume)
    ends = [line for line in lines if line["at"] == recipe.steps[int(line["stage"].split()[0])]]
    table(["stage", "steps", "loss of words"], [[line["stage"], str(line["at"]), f"{line['words']:.4f}"] for line in ends])
    if recipe.task in TASKS:
        task = named_task(recipe.task, recipe.families or None)
        scores = validated(checkpoint, out, task, recipe.examined)
        write_thinker_card(options, recipe, checkpoint, out, task, scores, before)
        table(["validation problems", "answered right"], [[name, f"{value:.4f}"] for name, value in scores.items()])
    seated = recipe.as_mode().patches != "random"
    told = f"play:  monologue play --graph latent --thinker {out}{_world(recipe.task if recipe.task in TASKS else '', recipe.families)}"
    print(told if seated else "patches by lot are a control: it takes no seat")
    return 0
