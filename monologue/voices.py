"""Rationales in the words of a checkpoint's own codec, for those who train without knowing agents or tasks.

The prompt is that of graphs ``direct`` and ``latent``: picture, question, choices. Steps and answer are plain replies one after another,
as they would stand in a policy's mouth.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from monologue.agents import answerer
from monologue.agents.codec import Codec, TinyCodec
from monologue.agents.load import codec_for
from monologue.agents.messages import Reply
from monologue.backends.checkpoints import Checkpoint
from monologue.backends.inputs import Inputs
from monologue.tasks.base import Problem, Task
from monologue.tasks.corpora import CORPORA, Corpus
from monologue.traces.images import Picture, decode
from monologue.traces.store import RunReader
from monologue.training.internalise import Lesson, lesson
from monologue.training.latent import Latent, endless
from monologue.training.rationales import Rationale, RationaleError, of_problem, of_run
from monologue.training.recipe import RecipeError

Ids = tuple[int, ...]


class CodecVoice:
    """A codec as ``training.internalise.Voice``."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._between = "" if isinstance(codec, TinyCodec) else "\n"

    def prompt(self, rationale: Rationale, pictures: Sequence[Picture]) -> Ids:
        """As graph ``direct`` opens."""
        return self._codec.open(answerer.direct(self._codec.wording, rationale.question, rationale.choices, pictures))

    def said(self, text: str) -> Ids:
        """A step; with chat models a line of its own, as IVT-LR has it."""
        return self._codec.action_ids(Reply(text + self._between))[: -len(self._codec.stop_ids)]

    def ending(self, answer: str) -> Ids:
        """The answer and the stop id."""
        return self._codec.action_ids(Reply(answer))


def voice_of(checkpoint: Checkpoint, inputs: Inputs) -> CodecVoice:
    """For a checkpoint. Raises CodecError where no codec fits its tokenizer."""
    return CodecVoice(codec_for(checkpoint.tokenizer, inputs))


def lessons_of(recipe: Latent, checkpoint: Checkpoint, named: Callable[[str, str | None], Task]) -> Callable[[int], Lesson]:
    """The i-th lesson of a training for one checkpoint. Raises RecipeError, RunError, TaskError, CodecError."""
    inputs, rationale = Inputs(checkpoint), rationales_of(recipe, named)
    return Lessons(rationale, voice_of(checkpoint, inputs), inputs, recipe)


class Lessons:
    """The i-th rationale as a lesson."""

    def __init__(self, rationale: Callable[[int], Rationale], voice: CodecVoice, inputs: Inputs, recipe: Latent) -> None:
        self._rationale, self._voice, self._inputs, self._recipe = rationale, voice, inputs, recipe
        self.fingerprint: str = getattr(rationale, "fingerprint", "")
        """Of all that there is to learn from; empty where it has no end."""

    def __call__(self, index: int) -> Lesson:
        recipe = self._recipe
        return lesson(self._rationale(index), self._voice, self._inputs, recipe.words == "replies", recipe.looks > 0)


def rationales_of(recipe: Latent, named: Callable[[str, str | None], Task]) -> Callable[[int], Rationale]:
    """The i-th rationale of a training, from the recipe's run, task or corpus. Raises RecipeError, RunError, TaskError."""
    if recipe.run:
        skipped = Counter[str]()
        found = of_run(RunReader(recipe.run), skipped)
        told = ", ".join(f"{count} x {cause}" for cause, count in skipped.items())
        print(f"{len(found)} dialogues of {recipe.run}" + (f"; left out: {told}" if told else ""))
    elif recipe.task in CORPORA:
        problems = Corpus(recipe.task, Path(recipe.folder or "."), decode).problems("train")
        found = [of_problem(problem) for problem in problems if problem.extra["steps"]]
    else:
        task = named(recipe.task, recipe.families or None)
        return lambda index: of_problem(_problem(task, index, recipe.seed))
    if not found:
        wanted = "dialogue that looked and ended in the right answer" if recipe.run else "problem with a picture and a rationale"
        raise RecipeError(f"{recipe.run or recipe.task!r} holds nothing to internalise: no {wanted}")
    return Endless(found, recipe.seed)


class Endless:
    """Rationales in an order of its own in each round."""

    def __init__(self, found: Sequence[Rationale], seed: int) -> None:
        self._found, self._place = found, endless(len(found), seed)
        told = json.dumps([(one.id, one.question, one.answer, [step.text for step in one.steps]) for one in found])
        self.fingerprint = f"{len(found)}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def __call__(self, index: int) -> Rationale:
        return self._found[self._place(index)]


def _problem(task: Task, index: int, seed: int) -> Problem:
    """One problem of a generated task's endless training split."""
    maker = getattr(task, "problem", None)
    if maker is None:
        raise RationaleError(f"task {task.name!r} is not generated; play it into a run and train from that")
    problem: Problem = maker("train", index, seed)
    return problem
