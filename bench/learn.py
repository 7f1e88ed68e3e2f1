"""Does reinforcement on outcome teach a questioner what its poor teacher did not? Two stages against either alone, per seed.

    python bench/learn.py [--seeds 0 1 2 3 4] [--again] [--out runs/learn] [--json bench/results/learn.json]

A questioner with random weights imitates 300 monologues; in a third of them every question is drawn from another problem, so is useless;
the answers it then hears are the learned answerer's, the conclusion is the right one. From this prior:

    prior        nothing more
    more         as many further updates on the same monologues as reinforcement takes
    reinforced   recipe ``outcome``: GRPO on the exact match of the answer, questioner only
    unprimed     the same reinforcement from random weights, without the first stage
    ppo          the same episodes and steps, with PPO's value head and a KL price of 0.02 in place of GRPO
    released     as ``ppo``, dialogues scored without the answers, as IMMO's released script does

All are examined greedily on the same held-out problems of the split ``test``, which no choice was made on. ``useful`` is the share of the
oracle's questions that were asked, although no reward speaks of questions. ``shuffled``: answers exchanged between episodes, to be at
chance or below. What was made already is not made again, and a killed run is resumed, so the command can be stopped and repeated. With
``--again`` seeds are run a second time beside their first: how far two runs of a seed are apart belongs to the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from monologue.agents.load import codec_for, load_policy
from monologue.backends.base import Sampling
from monologue.graphs.oracle import oracle
from monologue.graphs.play import play
from monologue.rollouts import reinforce
from monologue.seating import starter
from monologue.tasks.base import OracleTurn, Problem
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from monologue.training.claims import RECIPE
from monologue.training.imitate import imitate
from monologue.training.recipe import read_recipe
from monologue.training.reinforcement import Reinforcement
from monologue.training.starter.models import build_questioner, build_tokenizer

MONOLOGUES, USELESS, STEPS, BATCH, LR = 300, 1 / 3, 300, 16, 3e-3
ARMS = ("prior", "more", "reinforced", "unprimed", "ppo", "released")
PPO = {"name": "ppo", "kl": 0.02, "target": None}
CHANGES: dict[str, dict[str, Any]] = {"ppo": {"objective": PPO}, "released": {"objective": PPO, "compat": "released"}}


def weakened(problems: list[Problem], share: float, seed: int) -> Iterator[Problem]:
    """The problems, in some of which the oracle asks what belongs to others."""
    dice, asked = random.Random(seed), [turn.question for problem in problems for turn in problem.oracle or ()]
    for problem in problems:
        useless = dice.random() < share
        turns = tuple(OracleTurn(dice.choice(asked), "") for _ in problem.oracle or ())
        yield replace(problem, oracle=turns) if useless else problem


def first_stage(folder: Path, recipe: Reinforcement, seed: int) -> None:
    """``folder/random`` and ``folder/prior``."""
    tokenizer = build_tokenizer()
    for thing in (build_questioner(seed, tokenizer), tokenizer):
        thing.save_pretrained(folder / "random")
    problems = list(Shapes(recipe.families.split(",")).problems("train", MONOLOGUES, 1000 + seed))
    seats = {"questioner": oracle(codec_for(tokenizer)), "answerer": answerer()}
    play("monologue", weakened(problems, USELESS, seed), seats, folder / "corpus", progress=False)
    settings: dict[str, Any] = {"role": "questioner", "steps": STEPS, "batch": BATCH, "lr": LR, "seed": seed}
    imitate(folder / "corpus", folder / "random", folder / "prior", **settings, resume=begun(folder / "prior"))


def begun(folder: Path) -> bool:
    """Whether a training that was killed is to go on there."""
    return (folder / RECIPE).is_file()


def make(arm: str, folder: Path, recipe: Reinforcement, seed: int) -> Path:
    """The questioner of an arm, made where it is not there yet."""
    ready = folder / arm / "seconds.json"
    questioner = folder / arm if arm in ("prior", "more") else folder / arm / "questioner"
    if ready.exists():
        return questioner
    started = time.monotonic()
    if arm == "prior":
        first_stage(folder, recipe, seed)
    elif arm == "more":
        steps = recipe.iterations * recipe.steps
        settings: dict[str, Any] = {"role": "questioner", "steps": steps, "batch": BATCH, "lr": LR, "seed": seed + 1}
        imitate(folder / "corpus", folder / "prior", folder / arm, **settings, resume=begun(folder / arm))
    else:
        begin = folder / ("random" if arm == "unprimed" else "prior")
        own = Reinforcement.read({**recipe.model_dump(exclude_unset=True), **CHANGES.get(arm, {}), "questioner": str(begin), "seed": seed})
        reinforce(own, folder / arm, Shapes(recipe.families.split(",")), resume=(folder / arm / "run.json").exists())
    seconds = time.monotonic() - started
    if arm not in ("prior", "more"):  # of all lives of a run that was killed
        seconds = sum(json.loads(line)["seconds"] for line in (folder / arm / "metrics.jsonl").read_text().splitlines())
    ready.write_text(json.dumps(round(seconds, 1)))
    return questioner


def answerer() -> Any:
    return load_policy(starter("answerer"), "answerer", sampling=Sampling(temperature=0.0))


def examine(questioner: Path, run: Path, recipe: Reinforcement, count: int, control: str | None = None) -> dict[str, Any]:
    """Greedy accuracy on the first test problems, by family, and the share of the oracle's questions that were asked."""
    problems = {problem.id: problem for problem in Shapes(recipe.families.split(",")).problems("test", count)}
    sampling = Sampling(temperature=0.0, max_tokens=recipe.max_tokens)
    seats = {"questioner": load_policy(questioner, "questioner", sampling=sampling), "answerer": answerer()}
    options: dict[str, Any] = {"max_turns": recipe.max_turns, "control": control, "progress": False}
    summary = play("monologue", list(problems.values()), seats, run, **options)
    score = summary.score()
    asked = []
    for episode in RunReader(run).episodes():
        said = {call.output for call in episode.calls() if call.role == "questioner"}
        wanted = [turn.question for turn in problems[episode.start.problem_id].oracle or ()]
        asked.append(sum(any(question in one for one in said) for question in wanted) / len(wanted))
    families = {name: round(one.accuracy, 4) for name, one in summary.by_family().items()}
    facts = {"n": score.n, "accuracy": round(score.accuracy, 4), "stderr": round(score.stderr or 0.0, 4), "chance": round(score.chance, 4)}
    return {**facts, "by_family": families, "useful": round(statistics.fmean(asked), 4)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--again", action="store_true", help="a second run of these seeds, kept beside the first")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--n", type=int, default=1000, help="test problems")
    options.add_argument("--out", type=Path, default=Path("runs/learn"))
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learn.json")
    chosen = options.parse_args()
    recipe = Reinforcement.read(read_recipe("outcome"))
    for seed in chosen.seeds:
        for arm in chosen.arms:
            folder = chosen.out / (f"{seed}-again" if chosen.again else str(seed))
            kept = folder / f"{arm}.json"
            if not kept.exists():
                questioner = make(arm, folder, recipe, seed)
                found = examine(questioner, folder / f"test-{arm}", recipe, chosen.n)
                if arm == "reinforced":
                    found["shuffled"] = examine(questioner, folder / f"test-{arm}-shuffled", recipe, chosen.n, "shuffle-answers")[
                        "accuracy"
                    ]
                seconds = json.loads((folder / arm / "seconds.json").read_text())
                kept.write_text(json.dumps({"seed": seed, "again": chosen.again, "arm": arm, **found, "seconds": seconds}) + "\n")
            print(kept.read_text().strip())
    rows = [json.loads(file.read_text()) for arm in ARMS for file in sorted(chosen.out.glob(f"*/{arm}.json"))]
    command = "python bench/learn.py" + "; and --again --seeds 0 1" * any(row.get("again") for row in rows)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    result = {"name": "learn", "command": command, "machine": machine, "recipe": recipe.model_dump(mode="json"), "rows": rows}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps({**result, "ratio": summary_of(rows)}, indent=1) + "\n")
    print(json.dumps(summary_of(rows), indent=1))


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range of accuracy by arm."""
    found = {}
    for arm in ARMS:
        scores = [row["accuracy"] for row in rows if row["arm"] == arm]
        if scores:
            found[arm] = {"runs": len(scores), "mean": round(statistics.fmean(scores), 4), "least": min(scores), "most": max(scores)}
    return found


if __name__ == "__main__":
    main()
