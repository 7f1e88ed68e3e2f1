"""Are the thoughts used? What happens to the answers of a thinker when its latent steps are interfered with, for any model.

Accuracy alone says nothing: trained with dummies in their place, many models do as well (2512.21711, 2602.22766, 2605.18445). Here the same
problems are answered again with

    no latents        as if there had been no time to think
    pause             a constant word in place of every state, no patches: time, but no content
    shuffled          states and patches of another problem (the next one in its batch), as many steps as that one took
    mean              each step's mean state over all problems
    noise             a normal draw with each step's mean and spread
    random patches    the states as they are, patches drawn by lot

``shuffled`` is activation patching too: ``carried`` is how often the answer becomes that of the problem whose thoughts were carried over,
where the two differ; only there are high figures wanted. A control that leaves everything as it is (patches by lot for a thinker without
patches) is not listed. What the states hold is read off: a linear probe (ridge regression, fitted on one half of the problems, examined
on the other) names from state i what step i finds; ``recall`` is the share of steps whose needed patch was read again by then, beside
that of a fair draw.

A thinker passes where the first five fall to what a guesser has, and ``carried`` is near 1. Nothing is judged here; the table says what is.

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
from monologue.backends.perception.modes import Mode
from monologue.backends.perception.prompts import Prompts
from monologue.backends.perception.thoughts import Thoughts
from monologue.training.internalise import Lesson, forced

CONTROLS = ("none", "no latents", "pause", "shuffled", "mean", "noise", "random patches")
RIDGE, LEAST = 1.0, 20
"""Weight of the probe's ridge; problems without which there is no probe."""


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

    @property
    def silent(self) -> tuple[int, ...]:
        """Ids that are never said; the word that means "not finished" is one."""
        return self.banned if self.habit.think is None else (*self.banned, self.habit.think)

    def think(self, exam: Exam, **more: Any) -> Thoughts:
        """As the habit has it, or otherwise; ``steps`` of each lane instead of those at which it halts."""
        seeds = [self.seed * 1_000_003 + lane for lane in range(len(exam.lessons))]
        halt = None if "steps" in more else self.habit.halt(self.reasoner, self.banned)
        steps = more.pop("steps", self.habit.steps)
        if self.reasoner.mode.patches != "none":
            more = {"chosen": forced(exam.lessons, self.habit.steps), **more}
        seeded = seeds if self.reasoner.mode.patches == "random" else None
        return self.reasoner.think(exam.given, steps, seeds=seeded, halt=halt, **more)


@dataclass(frozen=True, slots=True)
class Plain:
    """A batch's thoughts without interference, as far as controls need them: keys and values are let go."""

    fed: Tensor  # (B, n, D)
    chosen: Tensor  # (B, n, K)
    patches: Tensor  # (B, n, K, D)
    steps: Tensor  # (B,)


@torch.inference_mode()
def spoken(thinking: Thinking, thoughts: Thoughts, count: int) -> Tensor:
    """(B, count) ids that are said after the thoughts, greedily."""
    logits, said = thinking.reasoner.say(thoughts.last), list[Tensor]()
    for place in range(count):
        if thinking.silent:
            logits = logits.index_fill(-1, torch.tensor(thinking.silent, device=logits.device), -math.inf)
        said.append(logits.argmax(-1))
        if place + 1 < count:
            logits = thinking.reasoner.hear(thoughts, said[-1])
    return torch.stack(said, dim=1)


def same(said: Tensor, wanted: Sequence[tuple[int, ...]]) -> list[bool]:
    """Whether each row of ids (B, T) begins with what it wants, word for word."""
    return [tuple(row[: len(one)]) == one for row, one in zip(said.tolist(), wanted, strict=True)]


def right(thinking: Thinking, thoughts: Thoughts, wanted: Sequence[tuple[int, ...]]) -> list[bool]:
    """Whether what is said after the thoughts, greedily, is word for word what each row wants."""
    return same(spoken(thinking, thoughts, max(map(len, wanted))), wanted)


def fitting(mode: Mode) -> tuple[str, ...]:
    """Controls that change something."""
    idle = {"random patches"} if mode.patches == "none" else set()
    idle |= {"mean", "noise"} if mode.thought != "state" else set()
    return tuple(name for name in CONTROLS if name not in idle)


@torch.inference_mode()
def controls(thinking: Thinking, exams: Sequence[Exam], names: Sequence[str] = (), pause_id: int = 0) -> list[dict[str, Any]]:
    """A row a control (by default all that fit): ``control``, ``n``, ``accuracy``, ``stderr``; ``carried`` for ``shuffled``.

    Raises ValueError for others.
    """
    fit = fitting(thinking.reasoner.mode)
    if unknown := [name for name in names if name not in fit]:
        raise ValueError(f"unknown controls {unknown!r} for this mode; choose from {', '.join(fit)}")
    plain = [_plain(thinking.think(exam)) for exam in exams]
    found = []
    for name in names or fit:
        hits: list[bool] = []
        carried: list[bool] = []
        for number, exam in enumerate(exams):
            endings = [one.ending for one in exam.lessons]
            said = spoken(thinking, _interfered(name, thinking, exam, plain, number, pause_id), max(map(len, endings)))
            hits += same(said, endings)
            if name == "shuffled":
                others = endings[1:] + endings[:1]
                carried += [hit for hit, own, other in zip(same(said, others), endings, others, strict=True) if own != other]
        row = {"control": name, **share(hits)}
        found.append({**row, "carried": share(carried)["accuracy"], "pairs": len(carried)} if name == "shuffled" else row)
    return found


def _plain(thoughts: Thoughts) -> Plain:
    return Plain(thoughts.fed, thoughts.chosen, thoughts.patches, thoughts.steps)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """n, mean and standard error."""
    n, mean = len(hits), sum(hits) / max(1, len(hits))
    return {"n": n, "accuracy": round(mean, 4), "stderr": round(math.sqrt(mean * (1 - mean) / max(1, n - 1)), 4)}


def _interfered(name: str, thinking: Thinking, exam: Exam, plain: Sequence[Plain], number: int, pause_id: int) -> Thoughts:
    own = plain[number]
    steps, looks = own.steps.tolist(), own.chosen.numel() > 0
    if name == "none":
        return thinking.think(exam)
    if name == "no latents":
        return thinking.think(exam, steps=0)
    if name == "pause":
        mode = replace(thinking.reasoner.mode, thought="pause", pause_id=pause_id, patches="none", selects="row", choice="hard")
        return replace(thinking, reasoner=LatentReasoner(thinking.reasoner.model, mode)).think(exam, steps=steps)
    if name == "shuffled":
        order = torch.arange(1, len(exam.lessons) + 1, device=own.steps.device) % len(exam.lessons)
        edits = Edits(states=lambda step, _: own.fed[order, step], patches=(lambda step, _: own.patches[order, step]) if looks else None)
        chosen = {"chosen": own.chosen[order]} if looks else {}
        return thinking.think(exam, steps=own.steps[order].tolist(), edits=edits, **chosen)
    if name == "random patches":
        return thinking.think(exam, steps=steps, chosen=_drawn(own, exam, thinking.seed + number))
    return thinking.think(exam, steps=steps, edits=Edits(states=_drawn_states(name, plain, thinking.seed + number)))


def _drawn_states(name: str, plain: Sequence[Plain], seed: int) -> Callable[[int, Tensor], Tensor]:
    """The mean of all problems' states at a step, alone or with their spread."""
    dice = torch.Generator().manual_seed(seed)

    def made(step: int, own: Tensor) -> Tensor:
        every = torch.cat([one.fed[one.steps > step, step] for one in plain if one.fed.shape[1] > step])  # (all that took it, D)
        spread = every.std(0, correction=0) if name == "noise" else torch.zeros_like(every[0])
        return every.mean(0) + spread * torch.randn(own.shape, generator=dice).to(own)

    return made


def _drawn(own: Plain, exam: Exam, seed: int) -> Tensor:
    """(B, n, K) patches by lot, none twice in a row of the batch, as many as were chosen."""
    dice, made = random.Random(seed), torch.full_like(own.chosen, -1)
    for lane, patches in enumerate(exam.given.there.sum(1).tolist()):
        counts = (own.chosen[lane] >= 0).sum(-1).tolist()
        lot = iter(dice.sample(range(patches), min(patches, sum(counts))) + [-1] * sum(counts))
        for step, count in enumerate(counts):
            made[lane, step, :count] = torch.tensor([next(lot) for _ in range(count)])
    return made


@torch.inference_mode()
def probes(thinking: Thinking, exams: Sequence[Exam]) -> list[dict[str, Any]]:
    """Accuracy of a linear probe that names what step j finds from state i, for all i and j of which there are at least 20 problems; the
    diagonal is what a chain would show.
    """
    thoughts = [thinking.think(exam) for exam in exams]
    gists = [one.gists for exam in exams for one in exam.lessons]
    taken = torch.cat([one.steps for one in thoughts]).tolist()
    found = []
    for i in range(min(one.states.shape[1] for one in thoughts)):
        states = torch.cat([one.states[:, i] for one in thoughts]).double()  # (N, D)
        for j in range(max(map(len, gists))):
            rows = [row for row, words in enumerate(gists) if len(words) > j and taken[row] > i]
            if len(rows) >= LEAST:
                found.append({"state": i + 1, "finding": j + 1, **_probe(states[rows], [gists[row][j] for row in rows])})
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
        chosen += [[{place for place in step if place >= 0} for step in row] for row in thinking.think(exam).chosen.tolist()]
    found = []
    for step in range(max(map(len, needed), default=0)):
        pairs = [
            (line[step], row[: step + 1]) for row, line in zip(chosen, needed, strict=True) if len(line) > step < len(row) and row[step]
        ]
        if not pairs:
            break
        at, by = [want in row[-1] for want, row in pairs], [want in set().union(*row) for want, row in pairs]
        read = sum(len(set().union(*row)) for _, row in pairs) / len(pairs)
        facts = {"at": share(at)["accuracy"], "by": share(by)["accuracy"], "stderr": share(by)["stderr"]}
        found.append({"step": step + 1, "n": len(at), **facts, "draw": round(read / patches, 4)})
    return found
