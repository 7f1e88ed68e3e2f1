"""Is the shipped thinker luck? The same recipes from other seeds, from nothing to the controls.

    python bench/thinkers.py [--seeds 1 2 3 4] [--n 1000] [--out runs/thinkers] [--json bench/results/thinkers.json]
    python bench/thinkers.py --hops 6 --seeds 0 1 2      # longer ways: runs/thinkers6, bench/results/thinkers6.json

A seed is three commands: ``monologue train starter speaker``, ``monologue train latent latent`` from what it made, and
``monologue eval latent --controls`` on the problems of ``test`` on which the shipped thinker (seed 0) was examined. Every seed is
published, whatever it learned. What was made already is not made again. With ``--hops`` the questions are of one to so many hops, and the
thinker has a stage for every look-up of the longest; all else stands as in the recipes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from monologue.training.recipe import read_recipe

SHIPPED = 4
"""Hops of the longest question that the shipped pair was taught."""
RESULTS = Path(__file__).parent / "results"


def command(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "monologue", *map(str, words)], check=True)


def make(seed: int, folder: Path, n: int, hops: int) -> dict[str, Any]:
    """What the controls say of the thinker of a seed."""
    families = ",".join(f"hop{length}" for length in range(1, hops + 1))
    longer = ["--set", f'families="{families}"'] if hops != SHIPPED else []
    explicit, *latent = read_recipe("latent")["steps"]
    stages = ["--set", f"steps={[explicit, *latent[:1] * (hops + 1)]}"] if longer else []
    asked = ["--families", families] if longer else []
    speaker, thinker, told = folder / "speaker", folder / "thinker", folder / f"controls-{n}.json"
    _claimed(folder, {"seed": seed, "hops": hops})
    if not (speaker / "card.json").exists():
        command("train", "starter", "speaker", "--set", f"seed={seed}", *longer, "--out", speaker)
    if not (thinker / "card.json").exists():
        resumed = ["--resume"] if thinker.exists() else []
        command("train", "latent", "latent", "--set", f"seed={seed}", *longer, *stages, "--start", speaker, "--out", thinker, *resumed)
    if not told.exists():
        command("eval", "latent", "--controls", "--task", "hops", *asked, "--thinker", thinker, "--n", str(n), "--json", told)
    return row(seed, json.loads(told.read_text()))


def _claimed(folder: Path, facts: dict[str, int]) -> None:
    """What was made otherwise is not taken for this."""
    there = folder / "made.json"
    if there.exists() and json.loads(there.read_text()) != facts:
        raise SystemExit(f"{folder} was made otherwise ({there.read_text().strip()}); name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    there.write_text(json.dumps(facts) + "\n")


def row(seed: int, told: dict[str, Any]) -> dict[str, Any]:
    """Accuracy by control, the share of answers that came along with another problem's thoughts, and what state i says of finding i."""
    found = {one["control"]: one for one in told["controls"]}
    probes = [probe["accuracy"] for probe in told["probes"] if probe["state"] == probe["finding"]]
    carried = {key: found["shuffled"][key] for key in ("carried", "pairs")}
    return {"seed": seed, "n": found["none"]["n"], **{name: one["accuracy"] for name, one in found.items()}, **carried, "probes": probes}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    options.add_argument("--n", type=int, default=1000)
    options.add_argument("--hops", type=int, default=SHIPPED, choices=range(2, 7), help="of the longest question")
    options.add_argument("--out", type=Path, help="default: runs/thinkers, with the hops behind it where they are others")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    name = "thinkers" if chosen.hops == SHIPPED else f"thinkers{chosen.hops}"
    out, told = chosen.out or Path("runs") / name, chosen.json or RESULTS / f"{name}.json"
    rows = [row(0, json.loads((RESULTS / "thinker.json").read_text()))] if chosen.hops == SHIPPED else []
    for seed in chosen.seeds:
        rows.append(make(seed, out / str(seed), chosen.n, chosen.hops))
        print(json.dumps(rows[-1]))
    spread = {name: _spread([one[name] for one in rows]) for name, value in rows[0].items() if isinstance(value, float)}
    longer = f"--hops {chosen.hops} " if chosen.hops != SHIPPED else ""
    words = f"python bench/thinkers.py {longer}--seeds {' '.join(map(str, chosen.seeds))} --n {chosen.n}"
    result = {"name": name, "command": words, "machine": f"{platform.machine()}, Python {platform.python_version()}", "rows": rows}
    told.write_text(json.dumps({**result, "spread": spread}, indent=1) + "\n")
    print(json.dumps(spread, indent=1))


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(values), 4), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
