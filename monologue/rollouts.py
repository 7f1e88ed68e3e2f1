"""Plays for a trainer: the command line's side of ``monologue.training.sources.Stage``.

Roles that are trained are sampled, the others are greedy, so that what varies within a group is the trained policy alone. An examination is
greedy in every seat, on held-out problems, and leaves no trace.

A role plays in this process, or on SGLang servers (``served``), which get each version's weights from the run's folder.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from monologue.agents.hindsight import counterfactual, progress
from monologue.agents.load import load_policy
from monologue.agents.policy import Policy, close
from monologue.backends.base import Sampling
from monologue.backends.places import fingerprint, place
from monologue.graphs.play import play
from monologue.graphs.registry import find
from monologue.seating import chat_model, check_speaks, served, starter
from monologue.tasks.base import Problem, Task
from monologue.traces.store import RunError, RunWriter
from monologue.training.credit import COUNTERFACTUAL
from monologue.training.judges import judged, rated
from monologue.training.policies import Learner
from monologue.training.recipe import RecipeError
from monologue.training.reinforce import reinforce as train
from monologue.training.reinforcement import Reinforcement
from monologue.training.rewards import SCORE, Reward

TOGETHER = 128
"""Episodes at once."""


class Rollouts:
    """The seats of a recipe's graph, and its problems in order."""

    def __init__(self, recipe: Reinforcement, task: Task, seats: Mapping[str, Policy], own: Mapping[str, Reward] | None = None) -> None:
        """``own`` are rewards that a recipe may name beside ours. Raises RecipeError where a trained or served role has no seat, or an own
        reward is called as the task's score.
        """
        if SCORE in (own or {}):
            raise RecipeError(f"{SCORE!r} is the task's own score, which the task tells; expected another name for a reward of yours")
        strange = sorted({*recipe.trained, *recipe.served} - set(find(recipe.graph).roles))
        if strange:
            raise RecipeError(
                f"graph {recipe.graph!r} has no seat for {', '.join(strange)}; its seats are {', '.join(find(recipe.graph).roles)}"
            )
        self.recipe, self.task, self.seats, self._own = recipe, task, dict(seats), dict(own or {})
        self._next, self._problems = 0, self._endless()

    def play(self, iteration: int, pen: RunWriter) -> None:
        """Raises RunError where no episode of the iteration ended well."""
        recipe = self.recipe
        summary = play(
            recipe.graph,
            self.problems(iteration),
            self.seats,
            pen,
            samples=recipe.samples,
            seed=recipe.seed * 1_000_003 + iteration,
            max_turns=recipe.max_turns,
            concurrency=TOGETHER,
            score=self.task.score,
            weight=recipe.rewards.get(SCORE, 1.0),
            progress=False,
        )
        for episode in summary.failed[:1]:
            print(f"monologue: iteration {iteration}: {len(summary.failed)} episodes failed, e.g. {episode.error}", file=sys.stderr)
        if not summary.ok:
            raise RunError(f"no episode of iteration {iteration} ended well: {summary.failed[0].error}")

    def begin(self, role: str, source: str, version: str) -> None:
        """Servers, whatever weights somebody has given them, get those that training begins with. Raises BackendError."""
        if role in self.recipe.served:
            found = place(source)
            self._load(role, str(Path(found).absolute()) if Path(found).is_dir() else found, version)

    def push(self, role: str, folder: Path, version: str) -> None:
        """The engine of a role loads the folder. Raises BackendError."""
        self._load(role, str(folder.absolute()), version)

    def _load(self, role: str, weights: str, version: str) -> None:
        asyncio.run(self.seats[role].backend.load(weights, version))

    def policy(self, role: str) -> str:
        """A role's policy is named after it, whatever its weights."""
        return role

    def rewards(self) -> dict[str, Reward]:
        """The user's own, progress and counterfactuals by the questioner as it is, and the recipe's judge."""
        found: dict[str, Reward] = dict(self._own)
        if "questioner" in find(self.recipe.graph).roles:
            found |= {"progress": lambda episode: progress(self.seats["questioner"])(episode)}
            found |= {COUNTERFACTUAL: lambda episode: counterfactual(self.seats["questioner"])(episode)}
        return found | ({"judge": judged(rated(chat_model(self.recipe.judge)))} if self.recipe.judge else {})

    def examine(self, iteration: int) -> dict[str, float]:
        """Accuracy on the first validation problems."""
        greedy = {role: replace(seat, sampling=replace(seat.sampling, temperature=0.0)) for role, seat in self.seats.items()}
        problems = list(self.task.problems("validation", self.recipe.examine))
        options: dict[str, Any] = {"max_turns": self.recipe.max_turns, "concurrency": TOGETHER, "score": self.task.score, "progress": False}
        with tempfile.TemporaryDirectory() as folder:
            summary = play(self.recipe.graph, problems, greedy, Path(folder) / "run", **options)
        scores = {episode.problem_id: episode.score or 0.0 for episode in summary.episodes}
        return {"examined": sum(scores.values()) / len(problems)}

    def problems(self, iteration: int) -> list[Problem]:
        """An iteration's problems; a task that has an end begins again."""
        count = self.recipe.problems
        wanted = self.recipe.first + iteration * count
        if wanted < self._next:
            self._next, self._problems = 0, self._endless()
        found = list(itertools.islice(self._problems, wanted - self._next, wanted - self._next + count))
        self._next = wanted + count
        different = len({problem.id for problem in found})
        if different < count:
            raise RecipeError(f"problems={count} an iteration, but the split {self.recipe.split!r} of {self.task.name!r} has {different}")
        return found

    def _endless(self) -> Iterator[Problem]:
        while True:
            empty = True
            for problem in self.task.problems(self.recipe.split, None, self.recipe.seed):
                empty = False
                yield problem
            if empty:
                raise RecipeError(f"the split {self.recipe.split!r} of task {self.task.name!r} has no problems")


def reinforce(
    recipe: Reinforcement | Mapping[str, Any],
    out: str | Path,
    task: Task | None = None,
    *,
    rewards: Mapping[str, Reward] | None = None,
    resume: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Reinforces the policies that a recipe names, by playing ``task`` or, without one, from the runs that it names; writes run, curves and
    checkpoints to ``out`` and the trained policies to ``out/ROLE``. Returns the lines of ``metrics.jsonl``; ``more`` are further
    ``TrainingArguments``. ``rewards`` are functions of a finished episode (``training.rewards``) to which the recipe's key ``rewards``
    gives weights by name, as to ours. ``resume`` goes on with what a killed run left, from its beginning where it left no checkpoint.

    Raises RecipeError, RunError, RowError, GateError, BackendError, CodecError.
    """
    chosen = recipe if isinstance(recipe, Reinforcement) else Reinforcement.read(dict(recipe))
    main = PartialState(cpu=chosen.device == "cpu").is_main_process  # first of all: it gives each process its own device
    numbers: dict[str, Any] = {"device": chosen.device, "dtype": chosen.dtype, "lora": chosen.lora}
    learners = {role: Learner.open(source_of(chosen, role), **numbers) for role in chosen.trained}
    if task is None and rewards:
        raise RecipeError(f"rewards {sorted(rewards)} are given to episodes as they are played, but the recipe names runs")
    if task is None:
        return train(chosen, out, learners, None, resume=resume, **more)
    seats = seated(chosen) if main else {}  # one process plays
    try:
        stage = Rollouts(chosen, task, seats, rewards)
        for role in set(chosen.served) - set(chosen.trained) if main else ():
            stage.begin(role, source_of(chosen, role), fingerprint(place(source_of(chosen, role))))
        return train(chosen, out, learners, stage, resume=resume, **more)
    finally:
        asyncio.run(close(seats.values()))


def seated(recipe: Reinforcement) -> dict[str, Policy]:
    """The policies of a recipe, in this process or on its servers. Raises BackendError, CodecError."""
    found, numbers = {}, "bfloat16" if recipe.dtype == "bfloat16" else "float32"
    for role in find(recipe.graph).roles:
        heat, nucleus = (recipe.temperature, recipe.top_p) if role in recipe.trained else (0.0, 1.0)
        sampling = Sampling(heat, nucleus, max_tokens=recipe.max_tokens)
        check_speaks(source_of(recipe, role), role)
        if role in recipe.served:
            found[role] = served(recipe.served[role], role, sampling, role, source_of(recipe, role))
            continue
        engine: dict[str, Any] = {"max_batch": TOGETHER, "device": recipe.device, "dtype": numbers}
        found[role] = load_policy(source_of(recipe, role), role, sampling=sampling, policy_id=role, **engine)
    return found


def source_of(recipe: Reinforcement, role: str) -> str:
    """Folder or Hub name of a role's checkpoint. Raises RecipeError for a role that a recipe cannot name."""
    named = {"questioner": recipe.questioner, "answerer": recipe.answerer}
    if role not in named:
        raise RecipeError(f"a recipe names checkpoints for {', '.join(named)}, got the role {role!r}")
    return str(starter(role, recipe.graph, recipe.task)) if named[role] == "starter" else named[role]
