"""The proof in figures: log-probs recomputed from stored ids and pictures, over at least 10,000 sampled tokens, fp32 on CPU.

    python bench/replay.py [--n 250] [--json bench/results/replay.json]

The starter policies play validation problems greedily, with dice, and with dice and truncation, and each run is replayed with engines
loaded anew, in other batches than those that sampled. Published: largest and mean difference by role and setting, the off-by-one and
image-swap figures, seconds to play and to replay. It can lose: whatever is not the same for sampler and replay shows here.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from monologue.agents.load import load_policy
from monologue.backends.base import Sampling
from monologue.graphs.play import play
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.training.replay import TOLERANCE, replay
from monologue.training.rows import Counts, read_rows

SETTINGS = {
    "greedy": Sampling(temperature=0.0),
    "temperature 1.5": Sampling(temperature=1.5),
    "temperature 1.5, top_p 0.9": Sampling(temperature=1.5, top_p=0.9),
    "temperature 2, top_k 5": Sampling(temperature=2.0, top_k=5),
}


def measure(name: str, sampling: Sampling, n: int, run: Path) -> list[dict[str, Any]]:
    seats = {role: load_policy(starter(role), role, sampling=sampling) for role in ("questioner", "answerer")}
    started = time.perf_counter()
    play("monologue", Shapes().problems("validation", n), seats, run, progress=False)
    played = time.perf_counter()
    checks = replay(run)
    replayed = time.perf_counter()
    counts = Counts()
    for _ in read_rows(run, counts=counts):
        pass
    seconds = {"play_seconds": round(played - started, 1), "replay_seconds": round(replayed - played, 1)}
    common = {"setting": name, "sampled_tokens": counts.sampled, **seconds}
    return [{**common, "check": c.name, "ok": c.ok, "figure": c.figure, "detail": c.detail} for c in checks]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--n", type=int, default=250)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "replay.json")
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, sampling) in enumerate(SETTINGS.items()):
            rows += measure(name, sampling, chosen.n, Path(folder) / str(number))
    for row in rows:
        print(f"{row['setting']:28} {row['check']:18} {'ok' if row['ok'] else 'NO':3} {row['figure']:<10.3g} {row['detail'] or ''}")
    tokens = sum({row["setting"]: row["sampled_tokens"] for row in rows}.values())
    worst = max(row["figure"] for row in rows if row["check"].startswith("replay "))
    print(f"{tokens} sampled tokens, largest difference {worst:.2e} (target {TOLERANCE:.0e})")
    command = f"python bench/replay.py --n {chosen.n}"
    machine = f"{platform.machine()}, Python {platform.python_version()}, float32"
    ratio = {"sampled tokens": tokens, "largest difference": worst, "target": TOLERANCE}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(
        json.dumps({"name": "replay", "command": command, "machine": machine, "rows": rows, "ratio": ratio}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
