"""How old may experience be? The same training, its episodes played by weights of 0, 1, 4, 16 and 64 versions ago.

    python bench/staleness.py [--prior runs/learn/0/prior] [--lags 0 1 4 16 64] [--seeds 0] [--json bench/results/staleness.json]

An iteration is a version. The engine that plays is given each version so many iterations late; with a lag of 64 the first 64 iterations all
learn from the start's own words. The trainer knows which weights sampled which ids, as their log-probs stand in the trace:

    corrected   GRPO with truncated importance ratios (2.0) and the mask of blamed sequences that drifted (0.5 nats)
    as fresh    the same without either: stale ids are taken for one's own
    topr        tapered off-policy REINFORCE, made for old logs

Guards are off, so that what they would have stopped can be seen: ``effective`` is the least effective sample size of a run as a share,
which the guard ends below 0.3. ``accuracy`` is greedy, on held-out problems of the split ``test``. Arms are kept as they end; a killed
run is resumed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import learn

from monologue.rollouts import Rollouts, seated, source_of
from monologue.tasks.shapes import Shapes
from monologue.training.policies import Learner
from monologue.training.reinforce import reinforce
from monologue.training.reinforcement import Reinforcement

FAMILIES = "attribute,near"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "corrected": {"name": "grpo"},
    "as fresh": {"name": "grpo", "cap": None, "delta": None},
    "topr": {"name": "topr"},
}


class Late(Rollouts):
    """Plays with weights of some iterations ago."""

    def __init__(self, lag: int, *facts: Any) -> None:
        super().__init__(*facts)
        self.lag = lag

    def push(self, role: str, folder: Path, version: str) -> None:
        """Loads what was saved ``lag`` versions before this one; nothing where there was none yet. ``Played`` keeps them long enough."""
        number, _, run = version.removeprefix("v").partition(".")
        late = int(number) - self.lag
        if late > 0:
            name = f"v{late}.{run}"
            super().push(role, folder.parent / name, name)


def train(folder: Path, prior: Path, objective: dict[str, Any], lag: int, seed: int, iterations: int) -> dict[str, Any]:
    """The run's last reward, its least effective sample size, and its guards' other figures at their worst."""
    facts = {"questioner": str(prior), "families": FAMILIES, "problems": 16, "samples": 4, "max_tokens": 24, "max_turns": 5, "seed": seed}
    quiet = dict.fromkeys(("drift", "entropy", "effective", "masked"))
    more = {"iterations": iterations, "passes": 2, "lr": 3e-4, "keep": lag + 2, "save_every": 10, "guards": quiet, "objective": objective}
    recipe = Reinforcement.read({**facts, **more})
    learners = {role: Learner.open(source_of(recipe, role)) for role in recipe.trained}
    stage = Late(lag, recipe, Shapes(FAMILIES.split(",")), seated(recipe))
    lines = reinforce(recipe, folder, learners, stage, resume=(folder / "run.json").exists())
    late = lines[-10:]
    found = {"reward": round(sum(line["reward"] for line in late) / len(late), 4), "iterations": len(lines)}
    found |= {"effective": round(min(line["effective"] for line in lines), 4), "masked": round(max(line["masked"] for line in lines), 4)}
    return {**found, "seconds": round(sum(line["seconds"] for line in lines))}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--prior", type=Path, default=Path("runs/learn/0/prior"), help="questioner to begin with")
    options.add_argument("--lags", type=int, nargs="+", default=[0, 1, 4, 16, 64])
    options.add_argument("--arms", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--iterations", type=int, default=100)
    options.add_argument("--n", type=int, default=500, help="test problems")
    options.add_argument("--out", type=Path, default=Path("runs/staleness"))
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "staleness.json")
    chosen = options.parse_args()
    for seed in chosen.seeds:
        for lag in chosen.lags:
            for arm in chosen.arms:
                folder = chosen.out / str(seed) / f"{arm.replace(' ', '-')}-{lag}"
                kept = folder.with_suffix(".json")
                if not kept.exists():
                    told = train(folder, chosen.prior, OBJECTIVES[arm], lag, seed, chosen.iterations)
                    recipe = Reinforcement.read({"families": FAMILIES, "max_tokens": 24, "max_turns": 5})
                    test = folder.parent / f"test-{folder.name}"
                    told |= {
                        name: learn.examine(folder / "questioner", test, recipe, chosen.n)[name] for name in ("accuracy", "stderr", "n")
                    }
                    begun = {"arm": arm, "lag": lag, "seed": seed, "prior": chosen.prior.parent.name}
                    kept.write_text(json.dumps({**begun, **told}) + "\n")
                print(kept.read_text().strip(), flush=True)
    rows = [json.loads(file.read_text()) for file in sorted(chosen.out.glob("*/*.json"))]
    ratio = {f"{row['arm']}, {row['lag']} versions old, seed {row['seed']}": row["accuracy"] for row in rows}
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    runs = sorted({(row["prior"], row["seed"]) for row in rows})
    command = "; ".join(f"python bench/staleness.py --prior runs/learn/{prior}/prior --seeds {seed}" for prior, seed in runs)
    chosen.json.write_text(
        json.dumps({"name": "staleness", "command": command, "machine": machine, "rows": rows, "ratio": ratio}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
