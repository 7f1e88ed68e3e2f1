"""Is the shipped thinker luck? The same recipes from other seeds, from nothing to the controls.

    python bench/thinkers.py [--seeds 1 2 3 4] [--n 1000] [--out runs/thinkers] [--json bench/results/thinkers.json]

A seed is three commands: ``monologue train starter speaker``, ``monologue train latent latent`` from what it made, and
``monologue eval latent --controls`` on the problems of ``test`` on which the shipped thinker (seed 0) was examined. Every seed is
published, whatever it learned. What was made already is not made again.
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

RESULTS = Path(__file__).parent / "results"


def command(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "monologue", *map(str, words)], check=True)


def make(seed: int, folder: Path, n: int) -> dict[str, Any]:
    """What the controls say of the thinker of a seed."""
    speaker, thinker, told = folder / "speaker", folder / "thinker", folder / f"controls-{n}.json"
    if not (speaker / "card.json").exists():
        command("train", "starter", "speaker", "--set", f"seed={seed}", "--out", speaker)
    if not (thinker / "card.json").exists():
        resumed = ["--resume"] if thinker.exists() else []
        command("train", "latent", "latent", "--set", f"seed={seed}", "--start", speaker, "--out", thinker, *resumed)
    if not told.exists():
        command("eval", "latent", "--controls", "--task", "hops", "--thinker", thinker, "--n", str(n), "--json", told)
    return row(seed, json.loads(told.read_text()))


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
    options.add_argument("--out", type=Path, default=Path("runs/thinkers"))
    options.add_argument("--json", type=Path, default=RESULTS / "thinkers.json")
    chosen = options.parse_args()
    rows = [row(0, json.loads((RESULTS / "thinker.json").read_text()))]
    for seed in chosen.seeds:
        rows.append(make(seed, chosen.out / str(seed), chosen.n))
        print(json.dumps(rows[-1]))
    spread = {name: _spread([one[name] for one in rows]) for name, value in rows[0].items() if isinstance(value, float)}
    words = f"python bench/thinkers.py --seeds {' '.join(map(str, chosen.seeds))} --n {chosen.n}"
    result = {"name": "thinkers", "command": words, "machine": f"{platform.machine()}, Python {platform.python_version()}", "rows": rows}
    chosen.json.write_text(json.dumps({**result, "spread": spread}, indent=1) + "\n")
    print(json.dumps(spread, indent=1))


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(values), 4), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
