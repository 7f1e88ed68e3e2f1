"""Are the thoughts used? What happens to the answers of a thinker when its latent steps are interfered with, for any model.

Accuracy alone says nothing: trained with dummies in their place, many models do as well (2512.21711, 2602.22766, 2605.18445). Here the same
problems are answered again with

    no latents        as if there had been no time to think
    pause             a constant word in place of every state, no patches: time, but no content
    shuffled          states and patches of another problem (the next one in its batch)
    mean              each step's mean state over all problems
    noise             a normal draw with each step's mean and spread
    random patches    the states as they are, patches drawn by lot
    patched           another problem's thoughts, its own question and picture kept: how often its answer becomes the *other* one's
                      (``carried``), where the two differ. Only this control is passed by high figures.

and what the states hold is read off: a linear probe (ridge regression, fitted on one half of the problems, examined on the other) names
from state i what step i finds; ``recall`` is the share of steps whose needed patch was read again by then, beside that of a fair draw.

A thinker passes where the first six fall to what a guesser has, and ``carried`` is near 1. Nothing is judged here; the table says what is.

Shapes: B rows, n latent steps, K patches a step, D width, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from monologue.backends.latent import Habit
from monologue.backends.perception.ivtlr import Edits, LatentReasoner
from monologue.backends.perception.prompts import Prompts
from monologue.backends.perception.thoughts import Thoughts
from monologue.training.internalise import Lesson, forced

CONTROLS = ("none", "no latents", "pause", "shuffled", "mean", "noise", "random patches", "patched")
RIDGE = 1.0


@dataclass(frozen=True, slots=True)
class Exam:
    """A batch of problems."""

    given: Prompts
    lessons: Sequence[Lesson]
    needed: Sequence[Sequence[int]] = ()
    """Patches that each row's steps need, in order, where the task knows."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """A thinker under examination."""

    reasoner: LatentReasoner
    habit: Habit
    banned: tuple[int, ...] = ()
    """Ids that are never said."""
    seed: int = 0
    """Of noise, draws and random patches."""

    def think(self, exam: Exam, **more: Any) -> Thoughts:
        """As the habit has it, or otherwise."""
        lanes = len(exam.lessons)
        seeds = [self.seed * 1_000_003 + lane for lane in range(lanes)] if self.reasoner.mode.patches == "random" else None
        steps = more.pop("steps", self.habit.steps)
        more = {"chosen": forced(exam.lessons, steps), **more}
        return self.reasoner.think(exam.given, steps, seeds=seeds, halt=self.habit.halt(self.reasoner), **more)


@torch.inference_mode()
def right(thinking: Thinking, thoughts: Thoughts, wanted: Sequence[tuple[int, ...]]) -> list[bool]:
    """Whether what is said after the thoughts, greedily, is word for word what each row wants."""
    reasoner, longest = thinking.reasoner, max(map(len, wanted))
    logits, hits = reasoner.say(thoughts.last), torch.ones(len(wanted), dtype=torch.bool)
    for place in range(longest):
        if thinking.banned:
            logits = logits.index_fill(-1, torch.tensor(thinking.banned), -math.inf)
        said = logits.argmax(-1)
        there = torch.tensor([place < len(one) for one in wanted])
        hits &= ~there | (said == torch.tensor([one[place] if place < len(one) else -1 for one in wanted]))
        if place + 1 < longest:
            logits = reasoner.hear(thoughts, said)
    return hits.tolist()


@torch.inference_mode()
def controls(thinking: Thinking, exams: Sequence[Exam], names: Sequence[str] = CONTROLS, pause_id: int = 0) -> list[dict[str, Any]]:
    """A row a control: ``control``, ``n``, ``accuracy``, ``stderr``; ``carried`` for ``patched``. Raises ValueError for other names."""
    if unknown := [name for name in names if name not in CONTROLS]:
        raise ValueError(f"unknown controls {unknown!r}; choose from {', '.join(CONTROLS)}")
    plain = [thinking.think(exam) for exam in exams]
    found = []
    for name in names:
        hits: list[bool] = []
        carried: list[bool] = []
        for number, exam in enumerate(exams):
            endings = [one.ending for one in exam.lessons]
            thoughts = _interfered(name, thinking, exam, plain, number, pause_id)
            hits += right(thinking, thoughts, endings)
            if name == "patched":
                others = endings[1:] + endings[:1]
                again = right(thinking, _interfered(name, thinking, exam, plain, number, pause_id), others)
                carried += [hit for hit, own, other in zip(again, endings, others, strict=True) if own != other]
        row = {"control": name, **share(hits)}
        found.append({**row, "carried": share(carried)["accuracy"], "pairs": len(carried)} if name == "patched" else row)
    return found


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """n, mean and standard error."""
    n, mean = len(hits), sum(hits) / max(1, len(hits))
    return {"n": n, "accuracy": round(mean, 4), "stderr": round(math.sqrt(mean * (1 - mean) / max(1, n - 1)), 4)}


def _interfered(name: str, thinking: Thinking, exam: Exam, plain: Sequence[Thoughts], number: int, pause_id: int) -> Thoughts:
    own = plain[number]
    if name == "none":
        return thinking.think(exam)
    if name == "no latents":
        return thinking.think(exam, steps=0)
    if name == "pause":
        mode = replace(thinking.reasoner.mode, thought="pause", pause_id=pause_id, patches="none", selects="row")
        return replace(thinking, reasoner=LatentReasoner(thinking.reasoner.model, mode)).think(exam)
    if name in ("shuffled", "patched"):
        order = torch.arange(1, len(exam.lessons) + 1) % len(exam.lessons)
        edits = Edits(states=lambda step, _: own.fed[order, step], patches=lambda step, _: own.patches[order, step])
        return thinking.think(exam, chosen=own.chosen[order], edits=edits) if _patches(own) else thinking.think(exam, edits=edits)
    if name == "random patches":
        return thinking.think(exam, chosen=_drawn(own, thinking.seed + number)) if _patches(own) else thinking.think(exam)
    return thinking.think(exam, edits=Edits(states=_drawn_states(name, plain, thinking.seed + number)))


def _patches(thoughts: Thoughts) -> bool:
    return thoughts.chosen.numel() > 0


def _drawn_states(name: str, plain: Sequence[Thoughts], seed: int) -> Callable[[int, Tensor], Tensor]:
    """The mean of all problems' states at a step, alone or with their spread."""
    dice = torch.Generator().manual_seed(seed)

    def made(step: int, own: Tensor) -> Tensor:
        every = torch.cat([one.fed[:, step] for one in plain if one.fed.shape[1] > step])  # (all B, D)
        spread = every.std(0) if name == "noise" else torch.zeros_like(every[0])
        return every.mean(0) + spread * torch.randn(own.shape, generator=dice).to(own)

    return made


def _drawn(thoughts: Thoughts, seed: int) -> Tensor:
    """(B, n, K) patches by lot, none twice in a row, as many as were chosen."""
    dice, chosen = random.Random(seed), thoughts.chosen
    patches = thoughts.scores.shape[-1] if thoughts.scores is not None else int(chosen.max()) + 1
    made = torch.full_like(chosen, -1)
    for lane in range(len(chosen)):
        counts = (chosen[lane] >= 0).sum(-1).tolist()
        lot = iter(dice.sample(range(patches), min(patches, sum(counts))) + [-1] * sum(counts))
        for step, count in enumerate(counts):
            made[lane, step, :count] = torch.tensor([next(lot) for _ in range(count)])
    return made


@torch.inference_mode()
def probes(thinking: Thinking, exams: Sequence[Exam]) -> list[dict[str, Any]]:
    """Accuracy of a linear probe that names what step j finds from state i, for all i and j; the diagonal is what a chain would show."""
    states = [thinking.think(exam).states for exam in exams]
    steps, most = states[0].shape[1], min(len(one.gists) for exam in exams for one in exam.lessons)
    found = []
    for i in range(steps):
        inputs = torch.cat([one[:, i] for one in states]).double()  # (N, D)
        for j in range(most):
            words = [one.gists[j] for exam in exams for one in exam.lessons]
            found.append({"state": i + 1, "finding": j + 1, **_probe(inputs, words)})
    return found


def _probe(inputs: Tensor, words: Sequence[int]) -> dict[str, Any]:
    names = sorted(set(words))
    wanted = torch.tensor([names.index(word) for word in words])
    half = len(words) // 2
    x = torch.cat([(inputs - inputs[:half].mean(0)) / (inputs[:half].std(0) + 1e-6), torch.ones(len(inputs), 1)], dim=1)
    y = torch.nn.functional.one_hot(wanted[:half], len(names)).double()
    weights = torch.linalg.solve(x[:half].T @ x[:half] + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x[:half].T @ y)
    hits = (x[half:] @ weights).argmax(-1) == wanted[half:]
    common = max(words[half:].count(word) for word in names) / max(1, len(words) - half)
    return {**share(hits.tolist()), "majority": round(common, 4)}


@torch.inference_mode()
def recall(thinking: Thinking, exams: Sequence[Exam]) -> list[dict[str, Any]]:
    """For each step: share of rows whose needed patch was read again by that step (``at``) or by then (``by``), and that of a draw."""
    chosen, needed = [], [list(line) for exam in exams for line in exam.needed]
    patches = max(int(exam.given.there.sum(1).max()) for exam in exams)
    for exam in exams:
        chosen += thinking.think(exam).chosen.tolist()
    found = []
    for step in range(min(min(map(len, needed), default=0), len(chosen[0]) if chosen else 0)):
        at = [line[step] in row[step] for row, line in zip(chosen, needed, strict=True)]
        by = [any(line[step] in one for one in row[: step + 1]) for row, line in zip(chosen, needed, strict=True)]
        read = sum(len({place for one in row[: step + 1] for place in one if place >= 0}) for row in chosen) / len(chosen)
        facts = {"at": share(at)["accuracy"], "by": share(by)["accuracy"], "stderr": share(by)["stderr"]}
        found.append({"step": step + 1, "n": len(at), **facts, "draw": round(read / patches, 4)})
    return found
