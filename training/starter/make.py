"""One command a policy: ``monologue train starter answerer|questioner|direct|speaker``. Writes a checkpoint, its curve and its card.

    answerer     four-step curriculum (``answerer``)
    questioner   imitation of oracle monologues (``questioner``)
    direct       the rival: starts from the finished answerer (``direct-plain``: from its checkpoint after ``locate``), is grown with
                 layers that change nothing at first until it has as many parameters as questioner and answerer together, and is
                 trained to answer whole problems in one shot, with at least as many pictures and processor seconds in all
    speaker      every seat of the hops world (``speaker``); ``monologue train latent`` makes a thinker of it

Weights are rounded to bfloat16 before they are examined and saved, so the card speaks of the very numbers that ship.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monologue.tasks.base import Task
from monologue.tasks.hops import VOCABULARY, Hops
from monologue.tasks.shapes import Shapes
from monologue.tasks.shapes.task import content_hash
from monologue.training.recipe import RecipeError
from monologue.training.starter import answerer, direct, questioner, speaker
from monologue.training.starter.batches import Words
from monologue.training.starter.fit import Curve, Stage, fit, round_weights
from monologue.training.starter.models import build_answerer, build_image_processor, build_questioner, build_speaker, build_tokenizer
from monologue.training.starter.sight import Sight


def choose(recipe: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The recipe with only these stages to run. Raises RecipeError for names that it does not have."""
    known = [stage["name"] for stage in recipe["stage"]]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError(f"the recipe has no stages {unknown!r}; it has {', '.join(known)}")
    return {**recipe, "only": list(names)}


def stages_of(recipe: dict[str, Any]) -> list[Stage]:
    """The recipe's stages, or those that ``only`` names."""
    only = recipe.get("only")
    return [Stage(**stage) for stage in recipe["stage"] if only is None or stage["name"] in only]


def make(recipe: dict[str, Any], out: Path, start: Path | None = None) -> dict[str, Any]:
    """Trains the recipe's policy into ``out`` and returns its card.

    ``start`` is the perception checkpoint of ``direct``, or an answerer that goes on with the stages named in ``recipe["only"]``.
    """
    if recipe["policy"] not in _MAKERS:
        raise RecipeError(f"unknown policy {recipe['policy']!r}; expected one of {', '.join(_MAKERS)}")
    torch.set_num_threads(1)
    began = time.process_time()
    hops = recipe["policy"] == "speaker"
    if hops:
        hops_of(recipe)  # refused before anything is written
    bench = Bench(recipe, out, start, build_tokenizer(VOCABULARY) if hops else build_tokenizer(), Curve(out / "curve.jsonl"))
    model, scores = _MAKERS[recipe["policy"]](bench)
    processor = None if recipe["policy"] == "questioner" else build_image_processor(112, 84) if hops else build_image_processor()
    save(model, bench.tokenizer, out, processor)
    return write_card(out, recipe, model, scores, time.process_time() - began)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every policy is made with."""

    recipe: dict[str, Any]
    out: Path
    start: Path | None
    tokenizer: Any
    curve: Curve

    @property
    def seed(self) -> int:
        return int(self.recipe["seed"])

    @property
    def words(self) -> Words:
        return Words(self.tokenizer)


Made = tuple[Any, dict[str, float]]
"""A model and its examination."""


def _questioner(bench: Bench) -> Made:
    model, words = build_questioner(bench.seed, bench.tokenizer), bench.words
    for stage in stages_of(bench.recipe):
        stream = questioner.practice(words, stage.batch, bench.seed)
        parameters = list(model.named_parameters())
        fit(stage, parameters, stream, partial(questioner.imitate, model), bench.curve, partial(questioner.examine, model, words))
    round_weights(model)
    return model, questioner.examine(model, words, 2000)


def _answerer(bench: Bench) -> Made:
    model: Any = build_answerer(bench.seed, bench.tokenizer)
    if bench.start is not None:
        model = type(model).from_pretrained(bench.start, dtype=torch.float32)
    sight = Sight(model, bench.words)
    for stage in stages_of(bench.recipe):
        answerer.learn(sight, [stage], bench.seed, bench.curve)
        if stage.name == "locate":
            save(model, bench.tokenizer, bench.out / "perception", build_image_processor())
    round_weights(model)
    return model, answerer.examine(sight, 1000, "validation-final")


def _direct(bench: Bench) -> Made:
    if bench.start is None or not (bench.start / "config.json").is_file():
        raise RecipeError(
            f"'direct' starts from a perception checkpoint, but {bench.start} holds none; train the answerer and pass --start"
        )
    if bench.recipe.get("only") is None:
        model = direct.grow(bench.start, int(bench.recipe["layers"]), bench.seed, bench.tokenizer)
    else:
        model = type(build_answerer(bench.seed, bench.tokenizer)).from_pretrained(bench.start, dtype=torch.float32)
    sight = Sight(model, bench.words)
    for stage in stages_of(bench.recipe):
        direct.learn(sight, stage, bench.seed, bench.curve)
    round_weights(model)
    return model, direct.examine(sight, 2000)


def _speaker(bench: Bench) -> Made:
    task = hops_of(bench.recipe)
    learner = speaker.Speaker(build_speaker(bench.seed, bench.tokenizer), bench.words)
    for stage in stages_of(bench.recipe):
        speaker.learn(learner, stage, bench.seed, bench.curve, task)
    round_weights(learner.model)
    return learner.model, speaker.examine(learner, 1000, task)


_MAKERS: dict[str, Callable[[Bench], Made]] = {"answerer": _answerer, "questioner": _questioner, "direct": _direct, "speaker": _speaker}


def hops_of(recipe: dict[str, Any]) -> Hops:
    """The world of hops, cut to the recipe's families. Raises TaskError, RecipeError."""
    families = recipe.get("families", "")
    if not isinstance(families, str):
        raise RecipeError(f"expected families as one text with commas, got {families!r}")
    return Hops(families.split(",") if families else None)


def save(model: Any, tokenizer: Any, out: Path, processor: Any | None) -> None:
    """A bfloat16 checkpoint that ``from_pretrained`` reads. A copy is cast: casting there and back would round rotary tables for good."""
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)


def write_card(out: Path, recipe: dict[str, Any], model: nn.Module, scores: dict[str, Any], seconds: float) -> dict[str, Any]:
    card = {
        "policy": recipe["policy"],
        "command": recipe.get("command", f"monologue train starter {recipe['policy']}"),
        "seed": recipe["seed"],
        "stages": [asdict(Stage(**stage)) for stage in recipe["stage"]],
        "run_here": [stage.name for stage in stages_of(recipe)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": round(seconds),
        "torch": torch.__version__.split("+")[0],
        "world_sha256": recipe.get("world") or world_hash(hops_of(recipe) if recipe["policy"] == "speaker" else Shapes()),
        "weights_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "validation": scores,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def world_hash(task: Task) -> str:
    """Hash of a world's first hundred training problems, pixels included: changes when the generator does."""
    return content_hash(task.problems("train", 100))
