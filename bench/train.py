"""One online iteration of reinforcement beside TRL's GRPOTrainer: same model, prompts, group size, number of sampled ids, one thread.

    python bench/train.py [--trainers .venv-trainers] [--repeats 3] [--json bench/results/train.json]

Both sample the same number of ids from the same untrained questioner (it hardly ever ends by itself, so replies are cut at the limit),
reward each reply by its share of odd ids, and take one step of GRPO without KL. Ours also plays through LangGraph, writes every step to
disk, reads it back, proves it by the gate, and has the engine load the new weights from a file; TRL does none of this. Iterations after
the first are timed; the arms take turns. It can lose: the ratio is TRL's seconds a sampled id over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from monologue.rollouts import reinforce
from monologue.tasks.shapes import Shapes
from monologue.training.reinforcement import Reinforcement
from monologue.training.rewards import REWARDS
from monologue.training.starter.models import build_questioner, build_tokenizer
from monologue.training.starter.questioner import opening

HERE = Path(__file__).parent
TARGET = 2.0


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
    return [{"seconds": line["seconds"], "sampled": line["sampled"]} for line in reinforce(recipe, folder, Shapes())]


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
    facts: dict[str, Any] = {"episodes": 64, "samples": 4, "tokens": 16, "iterations": chosen.iterations, "lr": 1e-4}
    facts["prompts"] = [f"{opening(problem)} <conclude>" for problem in Shapes().problems("train", 16 * chosen.iterations)]
    rows: list[dict[str, Any]] = []
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = Path(scratch) / "model", build_tokenizer()
        for thing in (build_questioner(0, tokenizer), tokenizer):
            thing.save_pretrained(model)
        for repeat in range(chosen.repeats):
            cost = {}
            for arm in ("monologue", "TRL"):
                folder = Path(scratch) / f"{arm}-{repeat}"
                lines = ours(model, folder, facts) if arm == "monologue" else theirs(chosen.trainers / "bin/python", model, folder, facts)
                seconds, sampled = (statistics.fmean(line[name] for line in lines[1:]) for name in ("seconds", "sampled"))
                cost[arm] = seconds / sampled
                rows.append({"repeat": repeat, "arm": arm, "seconds": round(seconds, 3), "sampled": round(sampled, 1)})
                print(f"repeat {repeat}, {arm}: {seconds:.2f} s an iteration of {sampled:.0f} sampled ids")
            ratios.append(cost["TRL"] / cost["monologue"])
    ratio = {"median": round(statistics.median(ratios), 2), "least": round(min(ratios), 2), "most": round(max(ratios), 2), "target": TARGET}
    print(f"ratio: median {ratio['median']}, least {ratio['least']}, most {ratio['most']} (target {TARGET})")
    command = f"python bench/train.py --repeats {chosen.repeats} --iterations {chosen.iterations}"
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(
        json.dumps({"name": "train", "command": command, "machine": machine, "rows": rows, "ratio": ratio}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
