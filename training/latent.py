"""``monologue train latent``: a checkpoint that says its reasoning becomes one that thinks it, stage by stage (``internalise``).

Rationales come from the dialogues of a logged run, from the oracle monologues of a generated task, or from a corpus on disk. Batches are a
function of (seed, step) alone, so a training that was killed goes on from its last checkpoint as if nothing had happened, bit for bit on
a CPU. The optimizer is that of the other trainers; each stage has a warm-up and a cosine of its own.

The result is a checkpoint folder like any other with ``latent.json`` beside it, which says how it is to think; without the file it would be
an ordinary policy that answers badly.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import TrainerCallback

from monologue.backends.checkpoints import Checkpoint, save_checkpoint, take_weights
from monologue.backends.inputs import Inputs
from monologue.backends.latent import Habit
from monologue.backends.perception.ivtlr import LatentReasoner
from monologue.backends.perception.modes import MODES, Mode
from monologue.backends.perception.prompts import Prompts, prompts
from monologue.tasks.corpora import CORPORA
from monologue.training.claims import STATE, claim, latest, spend, spent, taken
from monologue.training.internalise import Lesson, Objective, internalisation
from monologue.training.loop import StreamTrainer, arguments
from monologue.training.muon import MuonAdamW
from monologue.training.recipe import RecipeError, follow
from monologue.training.starter.fit import round_weights

CURVE = "curve.jsonl"
Embed = Callable[[Any, Sequence[Lesson]], Prompts]


class Latent(BaseModel):
    """A recipe of this stage."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["latent"] = "latent"
    """The stage."""
    run: str = ""
    """Folder of a run whose dialogues are the rationales; or"""
    task: str = ""
    """a task whose problems bring them: hops, shapes, scienceqa, m3cot;"""
    folder: str = ""
    """where the files of scienceqa and m3cot lie."""
    families: str = ""
    """Of the task, separated by commas; empty: its usual ones."""
    model: str = "starter"
    """Checkpoint to begin with: a folder, a Hub name, or ``starter``."""
    words: Literal["dialogue", "replies"] = "dialogue"
    """What is said of a step: all of it, or only the reply, where the questions follow from the replies (``internalise``)."""
    mode: Literal["ours", "paper", "reference"] = "ours"
    """How a latent step is made (``backends.perception.modes``)."""
    settings: dict[str, Any] = {}
    """Fields of the mode to be set otherwise, e.g. ``{k = 2, gradients = "detached", bottleneck = "question"}``."""
    anchor: float = Field(0.0, ge=0)
    """Weight of the anchor loss."""
    looks: float = Field(0.0, ge=0)
    """Weight of the loss that attention shall choose the patches which a lesson says a step needs; wants ``choice = "through"``."""
    stop: Literal["fixed", "learned"] = "fixed"
    """Number of latent steps."""
    think: str = ""
    """With a learned stop: the word that says "not finished", one token of the tokenizer that is otherwise never said."""
    steps: list[int] = Field([600, 400, 400, 400], min_length=1)
    """Optimizer steps of each stage; the first is the explicit one, so there is a latent step less than entries; 0 leaves a stage out."""
    rehearsal: float = Field(0.0, ge=0, lt=1)
    """Share of a stage's batches that practise an earlier one again, drawn evenly (``uniform_prob`` in Coconut's released code)."""
    batch: int = Field(16, ge=1)
    """Rationales a step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: on matrices, AdamW on the rest; for small models (``training.muon``)."""
    lr: float = Field(4e-5, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Of the matrices with Muon, of all with AdamW."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of a gradient."""
    warmup: int = Field(20, ge=1)
    """Steps of each stage over which the learning rate rises."""
    floor: float = Field(0.02, ge=0, le=1)
    """Share of the learning rate at a stage's end."""
    frozen: list[str] = ["visual", "vision_tower"]
    """Parameters with one of these in their name are not trained."""
    partial: bool = False
    """Rationales may have more steps than there are latent ones; the rest is then said before the answer. Else they are refused."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that are saved; ``bfloat16`` rounds them first, in place, so that they are examined as they ship."""
    save_every: int = Field(200, ge=1)
    """Steps between checkpoints of the training."""
    examined: int = Field(1000, ge=1)
    """Validation problems on the card, where the task is a generated one."""
    seed: int = 0
    """Of the order of rationales."""

    @classmethod
    def read(cls, recipe: dict[str, Any]) -> Latent:
        """Raises RecipeError that names the keys at fault."""
        found = follow(cls, recipe, "latent")
        if bool(found.run) == bool(found.task):
            raise RecipeError(f"expected either a run or a task to take rationales from, got run={found.run!r} and task={found.task!r}")
        if (found.stop == "learned") != bool(found.think):
            raise RecipeError(f"stop='learned' needs a word 'think' to go on with, and only then, got {found.stop!r} with {found.think!r}")
        if min(found.steps) < 0 or not found.steps[-1]:
            raise RecipeError(f"expected steps of each stage, the last at least 1 and none below 0, got {found.steps!r}")
        if found.task in CORPORA and (found.words == "replies" or found.families):
            raise RecipeError(f"a corpus has neither replies nor families: leave words={found.words!r} and families={found.families!r} out")
        if found.folder and found.task not in CORPORA:
            raise RecipeError(f"'folder' is where the files of {' or '.join(CORPORA)} lie, got {found.folder!r} with task={found.task!r}")
        if found.families and found.run:
            raise RecipeError(f"a run has the families that were played: leave families={found.families!r} out")
        if (found.anchor or found.think) and (not found.latents or found.as_mode().thought == "none"):
            raise RecipeError(f"anchor={found.anchor} and think={found.think!r} are read from latent states, of which there are none here")
        if found.rehearsal and found.stop == "learned":
            raise RecipeError(f"an earlier stage would teach to stop earlier: rehearsal={found.rehearsal} goes with stop='fixed' only")
        mode = found.as_mode()
        if found.looks and (mode.patches, mode.choice) != ("attended", "through"):
            raise RecipeError(
                f"looks={found.looks} teaches attention to choose: it wants patches='attended' and choice='through', got {mode!r}"
            )
        return found

    @property
    def latents(self) -> int:
        """Latent steps in the last stage."""
        return len(self.steps) - 1

    def as_mode(self) -> Mode:
        """How a latent step is made. Raises RecipeError."""
        try:
            base = MODES[self.mode]
            return Mode(**{**{name: getattr(base, name) for name in base.__dataclass_fields__}, **self.settings})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"the settings do not make a mode: {error}") from error

    def stage(self, step: int) -> tuple[int, int]:
        """The stage that a step belongs to, and its number in it."""
        ends = list(itertools.accumulate(self.steps))
        stage = min(bisect_right(ends, step), self.latents)
        return stage, step - (ends[stage] - self.steps[stage])

    def practised(self, step: int) -> int:
        """The stage that a step's batch is taken through: its own or, rehearsing, an earlier one."""
        own = self.stage(step)[0]
        earlier, dice = [stage for stage in range(own) if self.steps[stage]], random.Random(f"rehearsal/{self.seed}/{step}")
        return dice.choice(earlier) if earlier and dice.random() < self.rehearsal else own

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: linear warm-up, then a cosine, anew in each stage."""
        stage, at = self.stage(step)
        cosine = 0.5 * (1 + math.cos(math.pi * at / self.steps[stage]))
        return min(1.0, (at + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)


def think_id(recipe: Latent, tokenizer: Any) -> int | None:
    """The word that says "not finished". Raises RecipeError where it is not one token."""
    if recipe.stop == "fixed":
        return None
    found = tokenizer.encode(recipe.think, add_special_tokens=False)
    if len(found) != 1 or found[0] == tokenizer.unk_token_id:
        raise RecipeError(
            f"expected 'think' to be one token of the model's tokenizer, got {recipe.think!r}, which is {len(found)} or unknown"
        )
    return int(found[0])


def endless(count: int, seed: int) -> Callable[[int], int]:
    """Place in a list of ``count`` for the i-th example of a training: each once before any comes again, each time in another order."""
    orders: dict[int, list[int]] = {}

    def place(index: int) -> int:
        pass_, at = divmod(index, count)
        if pass_ not in orders:
            orders.clear()
            orders[pass_] = random.Random(f"internalise/{seed}/{pass_}").sample(range(count), count)
        return orders[pass_][at]

    return place


def internalise(
    recipe: Latent,
    checkpoint: Checkpoint,
    lessons: Callable[[int], Lesson],
    out: str | Path,
    *,
    resume: bool = False,
    embed: Embed | None = None,
    after: Callable[[int, Any], dict[str, Any]] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Trains ``checkpoint`` into ``out`` on the lessons 0, 1, 2, ...; returns the lines of its curve.

    ``embed`` stands in for ``prompts`` where pictures were looked at before. ``after(stage, model)`` examines the model at the end of each
    stage. ``more`` are further ``TrainingArguments``. Raises RecipeError, RunError, BackendError, PictureError, RequestRefused.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("expected one process: 'train latent' does not share its batches out; start it without torchrun or accelerate")
    if refused := sorted({"gradient_accumulation_steps", "max_steps", "num_train_epochs"} & set(more)):
        raise RecipeError(f"{', '.join(refused)} cannot be given: batches and steps are those of the recipe")
    settled = _settled(recipe, lessons)
    claim(settled, Path(out), resume)
    training = _Training(recipe, checkpoint, lessons, Path(out), embed, after)
    training.check(lessons(0))
    training.before = spent(Path(out)) if resume else 0.0
    with taken(settled, Path(out), CURVE):
        return training.run(latest(Path(out) / STATE) if resume else None, more)


def _settled(recipe: Latent, lessons: Any) -> dict[str, Any]:
    """What must be the same when a training goes on: its recipe, and what it learns from."""
    return {**recipe.model_dump(mode="json"), "rationales": getattr(lessons, "fingerprint", "")}


class _Training:
    """One training."""

    def __init__(
        self,
        recipe: Latent,
        checkpoint: Checkpoint,
        lessons: Callable[[int], Lesson],
        out: Path,
        embed: Embed | None,
        after: Callable[[int, Any], dict[str, Any]] | None,
    ) -> None:
        self.recipe, self.checkpoint, self.lessons, self.out, self.after = recipe, checkpoint, lessons, out, after
        self.embed = embed or (lambda model, lessons: prompts(model, [one.asked for one in lessons]))
        self.objective = Objective(recipe.anchor, recipe.looks, think_id(recipe, checkpoint.tokenizer), Inputs(checkpoint).banned)
        self.model = _Learner(checkpoint, recipe.frozen)
        self.reasoner = LatentReasoner(checkpoint.model, recipe.as_mode())
        self.lines: list[dict[str, Any]] = []
        self.before, self.began = 0.0, time.process_time()
        """Processor seconds of earlier lives, and those of this process when this one began."""

    def run(self, start: Path | None, more: dict[str, Any]) -> list[dict[str, Any]]:
        recipe = self.recipe
        own = {
            "weight_decay": recipe.weight_decay,
            "max_grad_norm": recipe.clip,
            "adam_beta2": 0.98,
            "ignore_data_skip": True,
            "logging_strategy": "no",
            "save_strategy": "steps",
            "save_steps": recipe.save_every,
            "save_total_limit": 1,
            "disable_tqdm": True,
        }
        settings = arguments(self.out / STATE, steps=sum(recipe.steps), batch=1, lr=recipe.lr, seed=recipe.seed, **{**own, **more})
        groups = [{"params": [one for _, one in self.model.trained], "lr": recipe.lr}]
        self.trainer = _StagedTrainer(recipe, self.model, groups, self, self.loss, settings, callbacks=[_Ended(self)])
        done = 0 if start is None else int(json.loads((start / "trainer_state.json").read_text())["global_step"])
        self._reopen(done)
        self.trainer.begin(start, self.out)
        if recipe.dtype == "bfloat16":
            round_weights(self.checkpoint.model)
        dtype, model = getattr(torch, recipe.dtype), self.checkpoint.model
        save_checkpoint(self.checkpoint, self.out, model if model.dtype == dtype else copy.deepcopy(model).to(dtype))
        Habit(recipe.as_mode(), recipe.latents, self.objective.think).save(self.out)
        self._spend()
        return self.lines

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size = self.recipe.batch
        for step in range(self.trainer.state.global_step, sum(self.recipe.steps)):
            found = [self.lessons(index) for index in range(step * size, (step + 1) * size)]
            yield {"micro": (step, found), "first": True}

    def check(self, *lessons: Lesson) -> None:
        """Raises RecipeError for a rationale with more steps than are to be thought, and where nothing is trained."""
        if not self.model.trained:
            raise RecipeError(f"frozen={self.recipe.frozen!r} leaves nothing to train; name fewer parts of the model")
        most = max(len(one.steps) for one in lessons)
        if 0 < self.recipe.latents < most and not self.recipe.partial:
            raise RecipeError(
                f"a rationale has {most} steps, but 'steps' = {self.recipe.steps!r} ends with {self.recipe.latents} latent ones: "
                f"give {most + 1} entries, or partial = true to have the rest said"
            )

    def loss(self, model: Any, micro: tuple[int, list[Lesson]]) -> Tensor:
        step, lessons = micro
        self.check(*lessons)
        given = self.embed(self.checkpoint.model, lessons)
        seed = self.recipe.seed * 1_000_003 + step
        lost = internalisation(self.reasoner, given, lessons, self.recipe.practised(step), self.objective, seed)
        self.facts = {
            name: round(float(part.detach()), 5)
            for name, part in (("words", lost.words), ("anchor", lost.anchor), ("stop", lost.stop), ("looks", lost.looks))
            if part is not None
        }
        return lost.total(self.objective)

    def ended(self, step: int) -> None:
        """A step was taken; step is its number from 1."""
        stage, at = self.recipe.stage(step - 1)
        last = at + 1 == self.recipe.steps[stage]
        if last or (at + 1) % 20 == 0:
            line = {"step": step, "stage": f"{stage} latent", "at": at + 1, **self.facts}
            if last and self.after is not None:
                line |= self.after(stage, self.checkpoint.model)
            self.lines.append(line)
            with (self.out / CURVE).open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._spend()

    def _spend(self) -> None:
        spend(self.before + time.process_time() - self.began, self.out)

    def _reopen(self, done: int) -> None:
        """The curve so far, without what will be repeated."""
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / CURVE
        text = file.read_text() if done and file.is_file() else ""
        self.lines = [line for one in text.splitlines(keepends=True) if one.endswith("\n") and (line := json.loads(one))["step"] <= done]
        file.write_text("".join(json.dumps(line) + "\n" for line in self.lines))


class _Learner(nn.Module):
    """The model under training, in evaluation mode: no dropout."""

    def __init__(self, checkpoint: Checkpoint, frozen: Sequence[str]) -> None:
        super().__init__()
        self.model, self._checkpoint = checkpoint.model, checkpoint
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]

    def train(self, mode: bool = True) -> _Learner:
        super().train(False)
        return self

    def save(self, folder: Path, main: bool = True) -> None:
        if main:
            save_checkpoint(self._checkpoint, folder)

    def load(self, folder: Path) -> None:
        take_weights(self.model, str(folder))


class _StagedTrainer(StreamTrainer):
    """With the recipe's optimizer and learning rates."""

    def __init__(self, recipe: Latent, *rest: Any, **options: Any) -> None:
        super().__init__(*rest, **options)
        self._recipe = recipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self._recipe.optimizer == "adamw" or self.optimizer is not None:
            return super().create_optimizer(model)
        a, learner = self.args, self.accelerator.unwrap_model(self.model)
        self.optimizer = MuonAdamW(learner.trained, a.learning_rate, a.weight_decay, (a.adam_beta1, a.adam_beta2))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), self._recipe.rate)
        return self.lr_scheduler


class _Ended(TrainerCallback):
    """Tells a training when a step was taken, before a checkpoint is."""

    def __init__(self, training: _Training) -> None:
        self._training = training

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training.ended(state.global_step)
