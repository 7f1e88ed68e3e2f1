"""The starter questioner: imitation of oracle monologues on the endless training split, from nothing.

It practises three things in one mixture: the inner monologue (look-ups until it concludes), guessing without looking (so that the
``blind`` graph plays a policy that was trained to guess, not one caught unprepared), and concluding from a caption alone. Replies are
context and carry no loss. Outcome reward comes later, in stage two.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

from monologue.tasks.base import Problem
from monologue.tasks.shapes import Shapes
from monologue.training.starter.batches import IGNORED, Batch, Part, Words, caption

SHARES = {"monologue": 0.86, "blind": 0.06, "caption": 0.08}


def options(problem: Problem) -> str:
    return " ".join(f"<choice> {choice}" for choice in problem.choices)


def opening(problem: Problem, before: str = "") -> str:
    return f"<bos> <user> {before} {problem.question} {options(problem)} <assistant>"


def gold(problem: Problem) -> str:
    assert problem.gold is not None
    return f"{problem.choices[problem.gold]} <eos>"


def monologue(problem: Problem) -> list[Part]:
    """The questioner's whole stream, as the oracle would play it: what it weighs is said before the conclusion.

    Without that sentence, "same or not" stayed at chance for 3,000 steps while everything else was solved by 1,000.
    """
    parts: list[Part] = [(opening(problem), False)]
    for turn in problem.oracle or ():
        parts += [(f"<look> {turn.question} <eos>", True), (f"<tool> {turn.reply} <assistant>", False)]
    because = f"<because> {problem.explanation} " if problem.explanation else ""
    return [*parts, (f"{because}<conclude> {gold(problem)}", True)]


def forced(problem: Problem, before: str = "") -> list[Part]:
    """A conclusion at once, which the graph forces: from nothing (``blind``), or from a caption before the question (``caption``)."""
    return [(opening(problem, before) + " <conclude>", False), (gold(problem), True)]


def practice(words: Words, size: int, seed: int, shares: dict[str, float] = SHARES) -> Iterator[Batch]:
    """Endless batches from the training split."""
    rng = random.Random(f"questioner/{seed}")
    task = Shapes()
    for start in itertools.count(0, size):
        rows = []
        for index in range(start, start + size):
            problem = task.problem("train", index, seed)
            kind = rng.choices(tuple(shares), tuple(shares.values()))[0]
            if kind == "monologue":
                rows.append(monologue(problem))
            else:
                scene = problem.pictures[0].scene  # type: ignore[attr-defined]
                rows.append(forced(problem, caption(scene) if kind == "caption" else ""))
        ids, labels = words.batch(rows)
        yield Batch(ids, labels, None)


def imitate(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy of the spoken tokens."""
    said = batch.labels[:, 1:] != IGNORED
    states = model.model(input_ids=batch.ids, attention_mask=None, use_cache=False).last_hidden_state
    logits = states[:, :-1][said] @ model.get_input_embeddings().weight.T
    return F.cross_entropy(logits, batch.labels[:, 1:][said])


@torch.no_grad()
def examine(model: Qwen3ForCausalLM, words: Words, n: int = 300) -> dict[str, float]:
    """Share of validation monologues whose every spoken token is the likeliest one, all families and each."""
    model.train(False)
    task, right = Shapes(), {}
    for family in task.families:
        problems = [Shapes([family]).problem("validation", i) for i in range(n // len(task.families))]
        ids, labels = words.batch([monologue(p) for p in problems])
        guess = model(input_ids=ids, attention_mask=None).logits.argmax(-1)[:, :-1]
        wrong = (guess != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
        right[family] = 1 - wrong.any(1).float().mean().item()
    model.train()
    return {"exact": round(sum(right.values()) / len(right), 4), **{k: round(v, 3) for k, v in right.items()}}
