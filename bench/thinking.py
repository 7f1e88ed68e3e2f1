"""What thinking costs beside saying it, and beside answering at once: the same problems, the same engine, the same batches, in turns.

    python bench/hops.py --seeds 0 --arms direct spoken explicit ours      # makes the policies, all of one shape, under runs/hops/0
    python bench/thinking.py [--models runs/hops/0] [--n 256] [--repeats 5] [--json bench/results/thinking.json]
    python bench/thinkers.py --hops 6 --seeds 0                            # a pair for longer ways, under runs/thinkers6/0
    python bench/thinking.py --pair runs/thinkers6/0                       # that pair alone: bench/results/thinking6.json

Three hops and a colour, test problems. One model, one reply, from pixels to the last word, greedy, in batches:

    direct      the answer at once
    latent      four latent steps, then the answer (``--latent``: which arm of ``bench/hops.py``)
    replies     the four replies, then the answer
    dialogue    four questions with their replies, then the answer

and as users play them, every step recorded, 64 episodes at once, for as many hops as the pair was taught: graph ``latent`` with the thinker
and graph ``monologue`` with the speaker in both seats, the shipped ones or those of ``--pair``. Pictures are painted beforehand: a real
task has them.

Accuracy of the answer stands beside the seconds: ``direct`` is quick and wrong. A ratio is of times within a repeat; median, least, most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rollout import spread

from monologue.agents.load import load_policy
from monologue.backends.base import Sampling
from monologue.backends.checkpoints import open_checkpoint
from monologue.backends.garbage import settled
from monologue.backends.inputs import Inputs
from monologue.backends.latent import Habit
from monologue.backends.perception.ivtlr import LatentReasoner
from monologue.backends.perception.prompts import prompts
from monologue.graphs.play import play
from monologue.graphs.registry import find
from monologue.seating import starter
from monologue.tasks.base import Problem
from monologue.tasks.hops import Hops
from monologue.training import causal
from monologue.training.internalise import Lesson, lesson
from monologue.training.rationales import of_problem
from monologue.voices import voice_of

UNSEEN, BATCH = 4, 64
Run = Callable[[], float]
"""Plays all problems; accuracy."""


def alone(folder: Path, problems: Sequence[Problem], steps: int, replies: bool) -> Run:
    """One model, one reply, so many steps of the rationale said."""
    checkpoint, habit = open_checkpoint(str(folder), device="cpu", dtype=torch.float32), Habit.load(folder)
    inputs, reasoner = Inputs(checkpoint), LatentReasoner(checkpoint.model, habit.mode)
    voice, thinking = voice_of(checkpoint, inputs), causal.Thinking(reasoner, habit, inputs.banned)
    whole = [lesson(of_problem(problem), voice, inputs, replies) for problem in problems]
    lessons = [replace(one, steps=one.steps[:steps]) for one in whole]

    @torch.inference_mode()
    def batch(some: Sequence[Lesson]) -> list[bool]:
        exam = causal.Exam(prompts(checkpoint.model, [one.asked for one in some]), some)
        before = len(some[0].left(0)) - len(some[0].ending)  # all say equally many words
        words = causal.spoken(thinking, thinking.think(exam), len(some[0].left(0)))
        return causal.same(words[:, before:], [one.ending for one in some])

    def run() -> float:
        hits = [hit for first in range(0, len(lessons), BATCH) for hit in batch(lessons[first : first + BATCH])]
        return sum(hits) / len(hits)

    return run


def played(graph: str, seats: dict[str, Any], problems: Sequence[Problem]) -> Run:
    """A graph, recorded."""
    seated = {role: seats[role] for role in find(graph).roles}

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            summary = play(graph, list(problems), seated, Path(folder) / "run", concurrency=BATCH, progress=False)
        if summary.failed:
            raise SystemExit(f"{len(summary.failed)} episodes failed: {summary.failed[0].error}")
        return summary.score().accuracy

    return run


def painted(family: str, n: int) -> list[Problem]:
    """Test problems with their pictures at hand."""
    problems = Hops([family]).problems("test", n, UNSEEN)
    return [replace(problem, pictures=tuple(picture().copy for picture in problem.pictures)) for problem in problems]


def pair_of(folder: Path | None) -> tuple[Path, Path]:
    """Where speaker and thinker lie: those of ``bench/thinkers.py`` in a folder, or the shipped ones."""
    return (starter("questioner", task="hops"), starter("thinker")) if folder is None else (folder / "speaker", folder / "thinker")


def taught(thinker: Path) -> tuple[str, ...]:
    """Families that a thinker was taught: it takes a step a hop, and one for the colour."""
    return tuple(f"hop{hops}" for hops in range(1, Habit.load(thinker).steps))


def seats(speaker: Path, thinker: Path) -> dict[str, Any]:
    """The thinker, and the speaker in the other seats."""
    greedy = Sampling(temperature=0.0)
    found = {role: load_policy(speaker, role, sampling=greedy, policy_id=role) for role in ("questioner", "answerer")}
    return {**found, "thinker": load_policy(thinker, "thinker", habit=Habit.load(thinker), trainable=False, sampling=greedy)}


def one_reply(folder: Path, latent: str, problems: Sequence[Problem]) -> dict[str, Run]:
    """The arms of one model and one reply."""
    return {
        "direct": alone(folder / "direct", problems, 0, True),
        "latent": alone(folder / latent, problems, 0, True),
        "replies": alone(folder / "explicit", problems, 4, True),
        "dialogue": alone(folder / "spoken", problems, 4, False),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--models", type=Path, default=Path("runs/hops/0"))
    options.add_argument("--latent", default="ours", help="arm of bench/hops.py that thinks")
    options.add_argument("--pair", type=Path, help="folder with a speaker and a thinker, in place of the shipped ones and of one reply")
    options.add_argument("--n", type=int, default=256)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    speaker, thinker = pair_of(chosen.pair)
    seated, worlds = seats(speaker, thinker), {family: painted(family, chosen.n) for family in taught(thinker)}
    name = f"thinking{len(worlds)}" if chosen.pair else "thinking"
    arms = {} if chosen.pair else one_reply(chosen.models, chosen.latent, worlds["hop3"])
    for family, some in worlds.items():
        arms[f"graph latent, {family}"] = played("latent:percent=0", seated, some)
        arms[f"graph monologue, {family}"] = played("monologue", seated, some)
    rows: list[dict[str, Any]] = []
    with settled():  # as ``monologue play`` does
        for repeat, (arm, run) in itertools.product(range(-1, chosen.repeats), arms.items()):  # the first is not counted
            started = time.perf_counter()
            accuracy = run()
            rows += [{"repeat": repeat, "arm": arm, "accuracy": round(accuracy, 4), "seconds": round(time.perf_counter() - started, 4)}]
    rows = [row for row in rows if row["repeat"] >= 0]
    times = {arm: [row["seconds"] for row in rows if row["arm"] == arm] for arm in arms}
    pairs = [] if chosen.pair else [("replies", "latent"), ("dialogue", "latent"), ("latent", "direct")]
    pairs += [(f"graph monologue, {family}", f"graph latent, {family}") for family in worlds]
    ratio = {f"{a} / {b}": spread([x / y for x, y in zip(times[a], times[b], strict=True)]) for a, b in pairs}
    which = f"--pair {chosen.pair}" if chosen.pair else f"--models {chosen.models} --latent {chosen.latent}"
    command = f"python bench/thinking.py {which} --n {chosen.n} --repeats {chosen.repeats}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, one thread"
    result = {"name": name, "command": command, "machine": machine, "batch": BATCH, "rows": rows, "ratio": ratio}
    (chosen.json or Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"ratio": ratio, "accuracy": {row["arm"]: row["accuracy"] for row in rows}}, indent=1))


if __name__ == "__main__":
    main()
