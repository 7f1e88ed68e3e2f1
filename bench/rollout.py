"""How much batching buys: the same episodes on the embedded default, 64 at once and one after another.

    python bench/rollout.py [--episodes 64] [--repeats 3] [--json bench/results/rollout.json]

Both arms play the same problems with the same starter policies, engines loaded before the clock starts, every step recorded. They take
turns within a repeat. The ratio is time one after another over time at once, per repeat; its median, least and most are published. Greedy
answers must be the same in both arms, else the comparison is void and the script fails. It can lose: with an engine that does not batch the
ratio is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from monologue.agents.load import load_policy
from monologue.agents.policy import Policy
from monologue.backends.base import Sampling
from monologue.graphs.play import play
from monologue.seating import starter
from monologue.tasks.base import Problem
from monologue.tasks.shapes import Shapes

TARGET = 8.0


def run(problems: list[Problem], seats: dict[str, Policy], concurrency: int) -> tuple[float, list[str | None]]:
    """Wall seconds and answers by problem."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        summary = play("monologue", problems, seats, Path(folder) / "run", concurrency=concurrency, progress=False)
        seconds = time.perf_counter() - started
    if summary.failed:
        raise SystemExit(f"{len(summary.failed)} episodes failed: {summary.failed[0].error}")
    answers = {episode.problem_id: episode.answer for episode in summary.episodes}
    return seconds, [answers[problem.id] for problem in problems]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--episodes", type=int, default=64)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "rollout.json")
    chosen = options.parse_args()
    problems = list(Shapes().problems("validation", chosen.episodes))
    seats = {role: load_policy(starter(role), role, sampling=Sampling(temperature=0.0)) for role in ("questioner", "answerer")}
    run(problems[:4], seats, 4)
    rows: list[dict[str, Any]] = []
    ratios = []
    for repeat in range(chosen.repeats):
        together, first = run(problems, seats, chosen.episodes)
        alone, second = run(problems, seats, 1)
        if first != second:
            raise SystemExit("greedy answers differ between the arms; the comparison is void")
        ratios.append(alone / together)
        rows += [
            {"repeat": repeat, "arm": "at once", "episodes": chosen.episodes, "seconds": round(together, 3)},
            {"repeat": repeat, "arm": "one after another", "episodes": chosen.episodes, "seconds": round(alone, 3)},
        ]
        print(f"repeat {repeat}: at once {together:.2f} s, one after another {alone:.2f} s, ratio {alone / together:.1f}")
    ratio = {"median": round(statistics.median(ratios), 2), "least": round(min(ratios), 2), "most": round(max(ratios), 2), "target": TARGET}
    print(f"ratio: median {ratio['median']}, least {ratio['least']}, most {ratio['most']} (target {TARGET})")
    command = f"python bench/rollout.py --episodes {chosen.episodes} --repeats {chosen.repeats}"
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    result = {"name": "rollout", "command": command, "machine": machine, "rows": rows, "ratio": ratio}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
