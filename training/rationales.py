"""What is to be internalised: a question about pictures, the steps of a rationale, the answer. From dialogues or from a corpus.

The rationale of a monologue is its explicit dialogue, one step a turn: what the questioner asked and what it heard. So two policies that
talk teach a third that thinks. It is a sequence that nobody sampled, in the tokens of whoever is to learn it, hence made from words;
policy gradients have no business here. Corpora bring their rationales cut as the IVT-LR paper cuts them (``tasks.corpora``).

A step's ``text`` is all of it, its ``found`` what came of it: of a turn the reply, of a written rationale the step itself, for want of
something better. Its ``gist`` is the first word of that, which an anchor loss asks the latent state of the step to name.

    of_problem(problem)    its oracle monologue, or its corpus steps
    of_run(reader)         the look-ups of logged monologues, and what they concluded
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image

from monologue.tasks.base import Problem
from monologue.traces.store import Episode, RunReader


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a rationale."""

    text: str
    """All of it."""
    found: str
    """What came of it."""

    @property
    def gist(self) -> str:
        """The first word of what was found."""
        return self.found.split()[0]


@dataclass(frozen=True, slots=True)
class Rationale:
    """One example."""

    id: str
    """Problem or episode."""
    question: str
    choices: tuple[str, ...]
    pictures: tuple[Callable[[], Image], ...]
    steps: tuple[Step, ...]
    answer: str
    """As the policy is to word it."""
    way: tuple[int, ...] = ()
    """The part of the picture that each step looks up, where the task says so, and"""
    cells: int = 0
    """how many parts the picture has then: a policy must see it in as many patches."""


class RationaleError(ValueError):
    """Nothing that could be internalised."""


def of_problem(problem: Problem) -> Rationale:
    """The oracle monologue of a problem, one step a turn, or the steps of its corpus. Raises RationaleError where it has neither."""
    if problem.gold is None:
        raise RationaleError(f"problem {problem.id!r} has no gold answer to reason towards")
    if problem.oracle is not None:
        steps = tuple(turn_step(turn.question, turn.reply) for turn in problem.oracle)
    elif problem.extra.get("steps"):
        steps = tuple(Step(text, text) for text in problem.extra["steps"] if text.strip())
    else:
        raise RationaleError(f"problem {problem.id!r} has neither an oracle monologue nor a rationale")
    way, cells = tuple(problem.extra.get("way", ())), len(problem.extra.get("cells", ()))
    return Rationale(problem.id, problem.question, problem.choices, problem.pictures, steps, problem.choices[problem.gold], way, cells)


def bare(problem: Problem) -> Rationale:
    """Question and answer alone. Raises RationaleError for a problem without gold."""
    if problem.gold is None:
        raise RationaleError(f"problem {problem.id!r} has no gold answer to reason towards")
    return Rationale(problem.id, problem.question, problem.choices, problem.pictures, (), problem.choices[problem.gold])


def of_run(run: RunReader, skipped: Counter[str] | None = None, solved: bool = True) -> list[Rationale]:
    """The dialogues of a run by ids of problems, whichever ended first; ``solved``: only those that concluded with the gold answer. What
    gives none is counted by cause.

    Raises RunError on a damaged run.
    """
    skipped = Counter() if skipped is None else skipped
    told = list[tuple[tuple[str, int, str], Rationale]]()
    for episode in run.episodes():
        found = _of_episode(episode, run, solved)
        if isinstance(found, str):
            skipped[found] += 1
        else:
            told.append(((episode.start.group_id, episode.start.sample_index, found.id), found))
    return [rationale for _, rationale in sorted(told, key=lambda one: one[0])]


def _of_episode(episode: Episode, run: RunReader, solved: bool) -> Rationale | str:
    """The rationale, or why there is none."""
    start, end = episode.start, episode.end
    if not episode.complete or end is None:
        return "failed or unfinished episode"
    if end.answer is None:
        return "no answer"
    if solved and (start.gold is None or end.answer.strip().lower() != start.choices[start.gold].strip().lower()):
        return "wrong answer"
    steps: list[Step] = []
    shown: list[str] = []
    asked, enlarged = "", False
    for call in episode.calls():
        action = json.loads(call.action) if call.action else {}
        if action.get("kind") == "look":
            asked, enlarged = action["question"], bool(action.get("region"))
        elif action.get("kind") == "reply" and asked:
            steps.append(turn_step(asked, action["text"]))
            asked = ""
        if not shown:  # the problem's own pictures: those of the first call that sees, without the parts that it saw enlarged
            shown = [image.sha256 for image in call.images][: len(call.images) // (2 if enlarged else 1)]
    if not steps:
        return "no look-up"
    pictures = tuple(_stored(run, sha256) for sha256 in shown)
    return Rationale(episode.start.episode_id, start.question, start.choices, pictures, tuple(steps), end.answer)


def turn_step(question: str, reply: str) -> Step:
    """A look-up and its answer."""
    return Step(f"{question} {reply}", reply)


def _stored(run: RunReader, sha256: str) -> Callable[[], Image]:
    def opened() -> Image:
        image: Image = run.picture(sha256)
        return image

    return opened
