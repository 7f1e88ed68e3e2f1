"""Stage two: reinforcement on outcome, from episodes that are played as the policies change, or from logged runs.

    iteration:  push weights ─► play into the run ─► rewards ─► rows ─► forward pass ─► gate, guards ─► credit ─► lessons ─► steps

The run is experience, log and checkpoint of the rollouts at once. Each iteration's episodes are written by a pen named after it,
so a run that was killed finds them again, and the losses after a resume are those of an uninterrupted run, bit for bit on a CPU. What
else must survive, running means and the KL's price, stands in ``metrics.jsonl``.

Who plays is passed in (``Stage``): this room knows neither graphs nor agents, so it trains from logs where no graph can run.

What is left out: replies that are still being sampled while weights change, and sharded weights that no single process can save.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback

from monologue.backends.garbage import settled
from monologue.backends.tokens import tokenizer_hash
from monologue.traces.store import RunWriter, read_info
from monologue.training import credit
from monologue.training.claims import STATE, latest
from monologue.training.collate import Batch, Collate
from monologue.training.experience import Lesson, Micro, deal, lessons, over, recorded, sampled, spread
from monologue.training.gate import GateError
from monologue.training.loop import StreamTrainer, arguments, trackers
from monologue.training.objectives import Ppo
from monologue.training.policies import Learner, Policies
from monologue.training.recipe import RecipeError
from monologue.training.reinforcement import Reinforcement
from monologue.training.released import as_released
from monologue.training.report import Report
from monologue.training.rewards import REWARDS, SCORE, Wanted
from monologue.training.rows import Row, same_ids
from monologue.training.sources import Logged, Played, Source, Stage


def reinforce(
    recipe: Reinforcement,
    out: str | Path,
    learners: Mapping[str, Learner],
    stage: Stage | None = None,
    *,
    resume: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Trains ``learners`` (by role, those of ``recipe.trained``) and writes run, curves and checkpoints to ``out``; the result of each role
    lies in ``out/ROLE``. ``stage`` plays, unless the recipe names runs. Returns the lines of ``metrics.jsonl``. ``more`` are further
    ``TrainingArguments``.

    Raises RecipeError, RunError, RowError, GateError, BackendError, PictureError.
    """
    _wanted(recipe, stage)
    trackers(more.get("report_to", recipe.report_to))
    if bool(recipe.runs) == (stage is not None):
        raise RecipeError("expected either runs to learn from or a stage to play on, got " + ("both" if recipe.runs else "neither"))
    process = PartialState(cpu=recipe.device == "cpu")
    begun = {"recipe": recipe.model_dump(mode="json"), "starts": {role: learner.checkpoint.version for role, learner in learners.items()}}
    with process.main_process_first():
        RunWriter(out, begun, resume=resume or not process.is_main_process).close()
    there = dict(read_info(out)["config"])
    recipe.continues(there.get("recipe", {}), str(out))
    _from(begun["starts"], there.get("starts", {}), str(out))
    return _Reinforcement(recipe, Path(out), learners, stage, more, latest(Path(out) / STATE) if resume else None).train()


def _from(starts: Mapping[str, str], there: Mapping[str, str], out: str) -> None:
    """Raises RecipeError where a checkpoint holds other weights than those with which the run in ``out`` was begun."""
    for role, version in starts.items():
        if there.get(role, version) != version:
            told = f"the checkpoint of {role!r} holds the weights {version!r}, and the run in {out!r} was begun with {there[role]!r}"
            raise RecipeError(f"{told}; bring those back, or begin another folder")


class _Reinforcement:
    """One training."""

    def __init__(
        self,
        recipe: Reinforcement,
        out: Path,
        learners: Mapping[str, Learner],
        stage: Stage | None,
        more: Mapping[str, Any],
        checkpoint: Path | None,
    ) -> None:
        """``checkpoint``: what a killed training left, to go on from."""
        self.recipe, self.out, self.checkpoint = recipe, out, checkpoint
        for role, learner in learners.items() if recipe.trees else ():
            attention = learner.checkpoint.model.config.get_text_config()._attn_implementation
            if attention != "sdpa":
                raise RecipeError(f"trees=true needs attention 'sdpa', which takes a mask of ours; {role!r} computes it by {attention!r}")
        self.policies = Policies(learners, recipe.trained if recipe.objective.critic else ())
        if recipe.shard:
            if checkpoint is not None:
                self.policies.load(checkpoint)
            self.policies.shard()
        self.learners = self.policies.learners
        self.ids = {role: tokenizer_hash(learner.checkpoint.tokenizer) for role, learner in learners.items()}
        self.reference = Policies({role: _again(learner, recipe) for role, learner in learners.items()}) if recipe.reference else None
        self.report = Report(out, recipe.iterations, PartialState().is_main_process)
        self.averages, self.penalties = credit.Averages(), {role: recipe.objective.penalty for role in recipe.trained}
        self.run_id = str(read_info(out)["run_id"])[:8]
        self.facts: dict[str, Any] = {}
        self.held: list[float] = []
        self.began = 0.0
        self.trainer = StreamTrainer(
            self.policies, self._groups(), self, self._loss, self._settings(more), callbacks=[_Closing(self)], sharded=recipe.shard
        )
        self.source = self._source(stage)

    def train(self) -> list[dict[str, Any]]:
        """From the beginning, or from where a checkpoint was taken."""
        checkpoint = self.checkpoint
        state = {"global_step": 0} if checkpoint is None else json.loads((checkpoint / "trainer_state.json").read_text())
        done = int(state["global_step"]) // self.recipe.steps
        if done > self.recipe.iterations:
            told = f"expected at least {done} iterations, which the run in {str(self.out)!r} has taken already"
            raise RecipeError(f"{told}, got iterations={self.recipe.iterations!r}")
        self.report.read(done)
        if self.report.history:
            last = self.report.history[-1]
            self.averages.means = dict(last["averages"])
            self.penalties = {role: last[self._name(role, "penalty")] for role in self.recipe.trained}
        elif isinstance(self.source, Logged) and self.recipe.proof and self.recipe.objective.ratios:
            self.source.prove(self.recipe.proof, self.recipe.tolerance)
        with self.report, settled():
            self.trainer.begin(checkpoint, *(self.out / role for role in self.learners))
        if isinstance(self.source, Played):
            self.source.push(self.recipe.iterations)
        for role, learner in self.learners.items():
            learner.save(self.out / role, self.trainer.args.should_save)
        return self.report.history

    def version(self, role: str, iteration: int) -> str:
        """Name of a role's weights as they are when an iteration begins; no other run has the same, so that logs may be mixed."""
        updates = self.recipe.updates(role, iteration)
        return f"v{updates}.{self.run_id}" if updates else self.learners[role].checkpoint.version

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Micro-batches from the present iteration on, made when they are asked for."""
        recipe, process = self.recipe, self.trainer.accelerator
        share = process.process_index, process.num_processes
        whole = recipe.objective.critic or recipe.objective.penalty > 0
        for iteration in range(self.trainer.state.global_step // recipe.steps, recipe.iterations):
            found = self._experience(iteration)
            collate = {lesson.role: self._collate(lesson.role) for lesson in found}
            for number in range(recipe.passes):
                seed = f"{recipe.seed}/{iteration}/{number}"
                together = self.trainer.args.gradient_accumulation_steps
                dealt: Iterable[Micro | None] = [None] * (recipe.minibatches * together)
                if found:
                    dealt = deal(found, collate, recipe.minibatches, recipe.accumulation, share, seed, whole, recipe.active(iteration))
                for place, micro in enumerate(dealt):
                    yield {"micro": micro, "first": place % together == 0}

    def _experience(self, iteration: int) -> list[Lesson]:
        """A batch, proven, and what is to be learned from it. Raises GateError before any step is taken on it."""
        recipe, began = self.recipe, time.perf_counter()
        self.facts, self.held, self.began = {"step": iteration}, [], began
        if recipe.examine_every and iteration % recipe.examine_every == 0:
            self.facts |= self._examined(iteration)
        rows = self.source.rows(iteration)
        if not rows:
            raise RecipeError(f"iteration {iteration} has nothing that {' or '.join(recipe.trained)} said; is it a seat, and trainable?")
        rows = [as_released(row) for row in rows] if recipe.compat else rows
        played = time.perf_counter()
        assigned = credit.assign(rows, recipe.credit, share=recipe.share, discount=recipe.discount, averages=self.averages)
        earned = credit.at_turns(rows)
        self.facts |= _described(rows, assigned, earned)
        found: list[Lesson] = []
        for role in recipe.active(iteration):
            mine = [row for row in rows if row.role == role]
            same_ids(mine, self.ids[role])
            found += self._lessons(role, iteration, mine, assigned.advantages, earned) if mine else []
        self._weighed(iteration, found)
        shown = spread(found) if recipe.objective.critic else assigned.advantages
        self.source.note(
            iteration, rows, shown, f"objective:{recipe.objective.name}" if recipe.objective.critic else f"credit:{recipe.credit}"
        )
        self.facts |= {"seconds playing": played - began, "seconds preparing": time.perf_counter() - played}
        return found

    def _weighed(self, iteration: int, found: Sequence[Lesson]) -> None:
        """Tells where an iteration teaches nothing."""
        active, said = self.recipe.active(iteration), {lesson.role for lesson in found}
        self.facts |= {self._name(role, "streams"): 0.0 for role in active if role not in said}
        self.facts["idle"] = math.fsum(lesson.idle for lesson in found) / len(found) if found else 1.0
        still = self.facts["idle"] == 1 and not self.recipe.objective.critic and not self.recipe.objective.penalty
        if (still or not found) and PartialState().is_main_process:
            told = f"all {len(found)} rows weigh nothing with the objective {self.recipe.objective.name!r}"
            why = f"{told}, since their rewards do not differ or suffice" if found else f"{active[0]!r}, whose turn it is, said nothing"
            print(f"monologue: iteration {iteration} teaches nothing: {why}", file=sys.stderr)

    def _lessons(
        self, role: str, iteration: int, rows: Sequence[Row], advantages: Mapping[str, float], earned: Mapping[str, float]
    ) -> list[Lesson]:
        collate, size, version = self._collate(role), self.recipe.forward_rows, self.version(role, iteration)
        checked = sampled(rows, version, self.recipe.verified, f"{self.recipe.seed}/{iteration}/{role}")
        some = rows if checked is None else [rows[place] for place in checked]
        found = over(some, collate, lambda batch: _seen(self.policies, role, batch), size)
        seen = dict(zip(("old", "entropy", "values"), found, strict=False))
        if checked is not None:
            seen = {name: _filled(rows, checked, values) for name, values in seen.items()}
        if self.reference is not None:
            before = self.reference
            with self.trainer.accelerator.autocast():
                (seen["reference"],) = over(rows, collate, lambda batch: (before(role, batch)[0].logprobs,), size)
        tolerance = math.inf if self.recipe.compat else self.recipe.tolerance
        learned, facts = lessons(
            *(role, rows, self.recipe.objective, advantages, earned, seen, version, self.penalties[role], tolerance),
            truncated=self.recipe.truncated,
            checked=checked,
        )
        entropy = self._name(role, "entropy")
        history = [{"entropy": line[entropy], "reward": line["reward"]} for line in self.report.history if entropy in line]
        guards = self.recipe.guards.model_copy(update={"drift": None}) if self.recipe.compat else self.recipe.guards
        guards.check(history, {**facts, "reward": self.facts["reward"]})
        self.facts |= {self._name(role, name): value for name, value in facts.items()}
        return learned

    def _name(self, role: str, fact: str) -> str:
        """Of a measure; where one role is trained it goes without saying."""
        return f"{role} {fact}" if len(self.recipe.trained) > 1 else fact

    def _loss(self, model: Any, micro: Micro | None) -> Tensor:
        """``micro`` is None where whoever is to move said nothing: a loss that reaches no weight, so that the step moves none, not even on
        by its momentum.
        """
        if micro is None:
            return torch.zeros((), device=self.trainer.accelerator.device, requires_grad=True)
        scored, values = model(micro.role, micro.batch)
        part = micro.part.to(scored.logprobs.device)
        penalty = self.penalties[micro.role]
        self.held.append(self.recipe.objective.held(scored.logprobs.detach(), part))
        loss = self.recipe.objective.loss(scored.logprobs, part, micro.count, None if values is None else values.double(), penalty)
        if not bool(loss.isfinite()):
            raise GateError(f"the loss of {micro.role!r} is {loss.item()!r} in iteration {self.facts['step']}; no step was taken on it")
        return loss

    def close(self) -> None:
        """An iteration's last step is taken: its line is written."""
        for role in self.recipe.trained:
            divergence = self.facts.get(self._name(role, "kl"))
            if isinstance(self.recipe.objective, Ppo) and divergence is not None:
                streams = int(self.facts[self._name(role, "streams")])
                self.penalties[role] = self.recipe.objective.adapted(self.penalties[role], divergence, streams)
            self.facts[self._name(role, "penalty")] = self.penalties[role]
        device = self.trainer.accelerator.device
        lost = self.trainer.accelerator.reduce(torch.tensor(self.trainer.lost, dtype=torch.float64, device=device), "sum").tolist()
        self.facts |= {"losses": lost, "loss": math.fsum(lost) / len(lost)}
        self.facts |= {"clipped": math.fsum(self.held) / max(1, len(self.held)), "averages": dict(self.averages.means)}
        self.facts["seconds"] = time.perf_counter() - self.began
        self.trainer.lost = []
        self.report.add(self.facts)
        numbers = {name: value for name, value in self.facts.items() if isinstance(value, float)}
        self.trainer.log(numbers)

    def _examined(self, iteration: int) -> dict[str, float]:
        assert isinstance(self.source, Played)
        self.source.push(iteration)
        return self.source.stage.examine(iteration) if self.trainer.args.should_save else {}

    def _collate(self, role: str) -> Collate:
        return Collate(self.learners[role].inputs, self.source.picture, trees=self.recipe.trees)

    def _source(self, stage: Stage | None) -> Source:
        recipe, process = self.recipe, self.trainer.accelerator
        if stage is None:
            return Logged(recipe.runs, recipe.trained, recipe.rows, recipe.seed)
        alone = {"main": process.is_main_process, "wait": process.wait_for_everyone}
        return Played(self.out, stage, self.learners, _wanted(recipe, stage), self.version, keep=recipe.keep, **alone)

    def _groups(self) -> list[dict[str, Any]]:
        critics = {role: list(self.policies.critics[role].parameters()) for role in self.policies.critics}
        return [
            {"params": [*self.learners[role].trained, *critics.get(role, [])], "lr": self.recipe.rate(role)} for role in self.recipe.trained
        ]

    def _settings(self, more: Mapping[str, Any]) -> Any:
        recipe = self.recipe
        own = {
            "gradient_accumulation_steps": recipe.accumulation * len(recipe.active(0)),
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": recipe.warmup,
            "max_grad_norm": recipe.clip,
            "adam_beta2": 0.99,
            "ignore_data_skip": True,
            "logging_strategy": "no",
            "save_strategy": "steps",
            "bf16": recipe.mixed == "bfloat16",
            "save_steps": recipe.save_every * recipe.steps,
            "save_total_limit": 2,
            "report_to": recipe.report_to,
            "disable_tqdm": True,
            "use_cpu": recipe.device == "cpu",
            "ddp_find_unused_parameters": len(recipe.trained) > 1,
        }
        steps, lr = recipe.iterations * recipe.steps, max(recipe.rate(role) for role in recipe.trained)
        return arguments(self.out / STATE, steps=steps, batch=1, lr=lr, seed=recipe.seed, **{**own, **more})


class _Closing(TrainerCallback):
    """Tells a training when an iteration's last step was taken, before a checkpoint is."""

    def __init__(self, training: _Reinforcement) -> None:
        self._training = training

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._training.recipe.steps == 0:
            self._training.close()


def _wanted(recipe: Reinforcement, stage: Stage | None) -> Wanted:
    """What is to be said of each episode, with weights; what a kind of credit has to know is said with weight 0. Raises RecipeError."""
    known = dict(REWARDS)
    if stage is not None:
        known.update(stage.rewards())
    weights = {name: weight for name, weight in recipe.rewards.items() if name != SCORE}
    if recipe.credit == credit.COUNTERFACTUAL:
        weights[credit.COUNTERFACTUAL] = 0.0
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise RecipeError(f"unknown rewards {', '.join(unknown)}; choose from {', '.join(sorted([*known, SCORE]))}")
    return {name: (known[name], weight) for name, weight in weights.items()}


def _again(learner: Learner, recipe: Reinforcement) -> Learner:
    """The same checkpoint once more, to stay as it is."""
    found = Learner.open(learner.checkpoint.source, device=recipe.device, dtype=recipe.dtype)
    found.checkpoint.model.requires_grad_(False)
    return found


def _seen(policies: Policies, role: str, batch: Batch) -> tuple[Tensor, ...]:
    scored, values = policies(role, batch, True)
    assert scored.entropies is not None
    return (scored.logprobs, scored.entropies) if values is None else (scored.logprobs, scored.entropies, values)


def _filled(rows: Sequence[Row], checked: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    """What was recomputed, in its places; elsewhere what was recorded."""
    known = dict(zip(checked, values, strict=True))
    return [known[place] if place in known else recorded(row) for place, row in enumerate(rows)]


def _described(rows: Sequence[Row], assigned: credit.Credit, earned: Mapping[str, float]) -> dict[str, float]:
    """Means over streams: what was earned, how many turns it took; over groups: how many had nothing to compare."""
    streams = {(row.episode_id, row.role, row.stream) for row in rows}
    scores = [score for row in rows if row.number == 0 and (score := row.reward(SCORE)) is not None]
    found = {
        "reward": math.fsum(earned.values()) / len(streams),
        "turns": sum(len(row.pieces) for row in rows) / len(streams),
        "sampled": float(sum(piece.stop - piece.start for row in rows for piece in row.pieces)),
        "flat": assigned.flat / assigned.groups if assigned.groups else 1.0,
    }
    return {**found, "score": math.fsum(scores) / len(scores)} if scores else found
