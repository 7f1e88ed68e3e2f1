"""One online iteration of reinforcement beside TRL's GRPOTrainer: same model, prompts, group size, number of sampled ids, one thread.

    python bench/train.py [--trainers .venv-trainers] [--repeats 3] [--json bench/results/train.json]

Both sample 64 replies from the same untrained policy (it hardly ever ends by itself, so replies are cut at the limit), reward each by
its share of odd ids, and take one step of GRPO without KL. Ours also plays through LangGraph, writes every step and the pictures to disk,
reads them back, proves a sample by the gate, and has the engine load the new weights from a file; TRL does none of this. What ours saves
grows with what a problem's episodes share, which is read once in sampling and once in training. So several settings are measured and none
is chosen, each in groups of 4 and of 8 (TRL's default):

    question   the questioner, the question alone (about 24 ids)
    caption    the questioner, the picture in words before the question (about 56)
    picture    the answerer, the picture before the question, of 9 or of 64 visual tokens (about 33 and 88)

Iterations after the first are timed; the arms take turns. It can lose: a ratio is TRL's seconds a sampled id over ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from monologue.rollouts import reinforce
from monologue.tasks.base import Problem
from monologue.tasks.shapes import Shapes
from monologue.training.reinforcement import Reinforcement
from monologue.training.rewards import REWARDS
from monologue.training.starter.batches import caption
from monologue.training.starter.models import build_answerer, build_image_processor, build_questioner, build_tokenizer
from monologue.training.starter.questioner import opening, options

HERE = Path(__file__).parent
TARGET = 2.0
SIDES = {"picture of 9 tokens": 84, "picture of 64 tokens": 224}
PROMPTS = ("question", "caption", *SIDES)
SEAT = {"blind": "questioner", "direct": "answerer"}


class Told(Shapes):
    """Shapes whose questions may come behind the picture in words."""

    def __init__(self, captioned: bool) -> None:
        super().__init__()
        self._captioned = captioned

    def problems(self, split: str, n: int | None = None, seed: int = 0) -> Iterator[Problem]:
        for problem in super().problems(split, n, seed):
            scene = problem.pictures[0].scene  # type: ignore[attr-defined]
            yield replace(problem, question=f"{caption(scene)} {problem.question}") if self._captioned else problem


def ours(model: Path, folder: Path, facts: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds and sampled ids of each iteration."""
    REWARDS["odd"] = lambda episode: statistics.fmean(token % 2 for call in episode.calls() for token in call.sampled_ids)
    recipe = Reinforcement.read(
        {
            **{SEAT[facts["graph"]]: str(model), "graph": facts["graph"], "trained": [SEAT[facts["graph"]]]},
            **{"problems": facts["episodes"] // facts["samples"], "samples": facts["samples"]},
            **{"max_tokens": facts["tokens"], "iterations": facts["iterations"], "lr": facts["lr"], "truncated": True, "max_turns": 1},
            **{"rewards": {"odd": 1.0}, "reference": False, "save_every": facts["iterations"], "verified": 8, "trees": True},
        }
    )
    lines = reinforce(recipe, folder, Told(facts["captioned"]))
    return [{"seconds": line["seconds"], "sampled": line["sampled"]} for line in lines]


def theirs(python: Path, model: Path, folder: Path, facts: dict[str, Any]) -> list[dict[str, float]]:
    """The same of TRL, in its own environment."""
    folder.mkdir()
    (folder / "given.json").write_text(json.dumps(facts))
    loader = HERE.parent / "tests_real" / "loaders" / "trl_iteration.py"
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    known.pop("PYTHONPATH", None)
    command = [str(python), str(loader), str(model), str(folder / "given.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=known, check=False)
    if done.returncode:
        raise SystemExit(f"TRL's arm failed: {done.stderr[-2000:]}")
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def given(prompt: str, samples: int, iterations: int, folder: Path) -> dict[str, Any]:
    """What both arms are given: the policy in ``folder/model``, the problems' texts and pictures, and how much to sample."""
    tokenizer, seen = build_tokenizer(), prompt in SIDES
    sighted = (build_answerer(0, tokenizer), build_image_processor(SIDES[prompt], SIDES[prompt])) if seen else ()
    for thing in (*(sighted or [build_questioner(0, tokenizer)]), tokenizer):
        thing.save_pretrained(folder / "model")
    problems = list(Told(prompt == "caption").problems("train", 64 // samples * iterations))
    facts: dict[str, Any] = {"episodes": 64, "samples": samples, "tokens": 16, "iterations": iterations, "lr": 1e-4}
    facts |= {"captioned": prompt == "caption", "graph": "direct" if seen else "blind"}
    if not seen:
        facts["prompts"] = [f"{opening(problem)} <conclude>" for problem in problems]
        return {**facts, "ids": _length(tokenizer, facts["prompts"])}
    facts["prompts"] = [f"{problem.question} {options(problem)}" for problem in problems]
    facts["pictures"] = [str(folder / f"{number}.png") for number in range(len(problems))]
    for problem, file in zip(problems, facts["pictures"], strict=True):
        problem.pictures[0]().save(file)
    around = 5 + (SIDES[prompt] // 28) ** 2  # <bos> <user> <|vision_start|> <|vision_end|> <assistant>, and the picture
    return {**facts, "ids": _length(tokenizer, facts["prompts"]) + around}


def _length(tokenizer: Any, texts: list[str]) -> float:
    return round(statistics.fmean(len(tokenizer(text).input_ids) for text in texts), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", type=Path, default=HERE.parent / ".venv-trainers")
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "train.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat, prompt, samples in itertools.product(range(chosen.repeats), chosen.prompts, (4, 8)):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            facts = given(prompt, samples, chosen.iterations, folder)
            setting = {"repeat": repeat, "prompt": prompt, "ids": facts["ids"], "group": samples}
            rows += [{**setting, **row} for row in _compared(chosen, folder / "model", folder, facts)]
            print(*(json.dumps(row) for row in rows[-2:]), sep="\n")
    found = {f"{prompt}, group of {group}": _ratio(rows, prompt, group) for prompt in chosen.prompts for group in (4, 8)}
    print(json.dumps({**found, "target": TARGET}, indent=1))
    command = f"python bench/train.py --repeats {chosen.repeats} --iterations {chosen.iterations}"
    result = {"name": "train", "command": command, "machine": f"{platform.machine()}, Python {platform.python_version()}", "rows": rows}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps({**result, "ratio": found, "target": TARGET}, indent=1) + "\n")


def _compared(chosen: argparse.Namespace, model: Path, folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean seconds and sampled ids of both arms' iterations after the first."""
    arms = {
        "monologue": lambda: ours(model, folder / "ours", facts),
        "TRL": lambda: theirs(chosen.trainers / "bin/python", model, folder / "theirs", facts),
    }
    found = []
    for arm, run in arms.items():
        lines = run()[1:]
        means = {name: statistics.fmean(line[name] for line in lines) for name in ("seconds", "sampled")}
        found.append({"arm": arm, "seconds": round(means["seconds"], 4), "sampled": round(means["sampled"], 1)})
    return found


def _ratio(rows: list[dict[str, Any]], prompt: str, group: int) -> dict[str, float]:
    mine = [row for row in rows if (row["prompt"], row["group"]) == (prompt, group)]
    cost = {arm: [row["seconds"] / row["sampled"] for row in mine if row["arm"] == arm] for arm in ("monologue", "TRL")}
    ratios = [theirs / ours for ours, theirs in zip(cost["monologue"], cost["TRL"], strict=True)]
    return {"median": round(statistics.median(ratios), 2), "least": round(min(ratios), 2), "most": round(max(ratios), 2)}


if __name__ == "__main__":
    main()
