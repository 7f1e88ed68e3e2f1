"""One online iteration of reinforcement beside TRL's GRPOTrainer: same model, prompts, group size, number of sampled ids, one thread.

    python bench/train.py [--trainers .venv-trainers] [--repeats 3] [--json bench/results/train.json]

Both sample 64 replies from the same untrained questioner (it hardly ever ends by itself, so replies are cut at the limit), reward each by
its share of odd ids, and take one step of GRPO without KL. Ours also plays through LangGraph, writes every step and the pictures to disk,
reads them back, proves a sample by the gate, and has the engine load the new weights from a file; TRL does none of this. What ours saves
grows with what a problem's episodes share, which is read once in sampling and once in training. So four settings are measured and none is
chosen: the question alone or a picture's caption before it (about 24 and 56 ids), groups of 4 and of 8 (TRL's default).

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
from monologue.training.starter.models import build_questioner, build_tokenizer
from monologue.training.starter.questioner import opening

HERE = Path(__file__).parent
TARGET = 2.0


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
            **{"questioner": str(model), "graph": "blind", "problems": facts["episodes"] // facts["samples"], "samples": facts["samples"]},
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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--trainers", type=Path, default=HERE.parent / ".venv-trainers")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--iterations", type=int, default=6)
    options.add_argument("--json", type=Path, default=HERE / "results" / "train.json")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = Path(scratch) / "model", build_tokenizer()
        for thing in (build_questioner(0, tokenizer), tokenizer):
            thing.save_pretrained(model)
        for repeat, (captioned, samples) in itertools.product(range(chosen.repeats), itertools.product((False, True), (4, 8))):
            facts: dict[str, Any] = {"episodes": 64, "samples": samples, "tokens": 16, "iterations": chosen.iterations, "lr": 1e-4}
            problems = Told(captioned).problems("train", 64 // samples * chosen.iterations)
            facts |= {"captioned": captioned, "prompts": [f"{opening(problem)} <conclude>" for problem in problems]}
            length = statistics.fmean(len(tokenizer(prompt).input_ids) for prompt in facts["prompts"])
            setting = {"repeat": repeat, "prompt": "caption" if captioned else "question", "ids": round(length, 1), "group": samples}
            rows += [{**setting, **row} for row in _compared(chosen, model, Path(tempfile.mkdtemp(dir=scratch)), facts)]
            print(*(json.dumps(row) for row in rows[-2:]), sep="\n")
    found = {f"{prompt}, group of {group}": _ratio(rows, prompt, group) for prompt in ("question", "caption") for group in (4, 8)}
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
