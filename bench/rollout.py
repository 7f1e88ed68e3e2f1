"""How much playing at once buys: the same episodes on the embedded default, one after another, 64 at once, and 64 at once on all cores.

    python bench/rollout.py [--episodes 64] [--repeats 5] [--processes 2] [--json bench/results/rollout.json]

All arms play the same problems with the same starter policies, engines loaded before the clock starts, every step recorded. They take
turns within a repeat. A ratio is time one after another over time at once, per repeat; median, least and most are published, for one
process (batching alone) and for a crew of processes that shares the 64 episodes (``--processes``, by default one per core). Greedy answers
must be the same in all arms, else the comparison is void and the script fails. It can lose: with an engine that does not batch the ratio
is 1 per process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from monologue.agents.load import load_policy
from monologue.agents.policy import Policy
from monologue.backends.base import Sampling
from monologue.graphs.crew import Crew
from monologue.graphs.play import play
from monologue.seating import starter
from monologue.tasks.base import Problem
from monologue.tasks.shapes import Shapes

TARGET = 8.0


def run(problems: list[Problem], seats: dict[str, Policy] | Crew, concurrency: int) -> tuple[float, list[str | None]]:
    """Wall seconds and answers by problem."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        if isinstance(seats, Crew):
            summary = seats.play("monologue", problems, Path(folder) / "run", concurrency=concurrency, progress=False)
        else:
            summary = play("monologue", problems, seats, Path(folder) / "run", concurrency=concurrency, progress=False)
        seconds = time.perf_counter() - started
    if summary.failed:
        raise SystemExit(f"{len(summary.failed)} episodes failed: {summary.failed[0].error}")
    answers = {episode.problem_id: episode.answer for episode in summary.episodes}
    return seconds, [answers[problem.id] for problem in problems]


def policies() -> dict[str, Policy]:
    return {role: load_policy(starter(role), role, sampling=Sampling(temperature=0.0)) for role in ("questioner", "answerer")}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "least": round(min(values), 2), "most": round(max(values), 2)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--episodes", type=int, default=64)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "rollout.json")
    chosen = options.parse_args()
    problems = list(Shapes().problems("validation", chosen.episodes))
    seats = policies()
    rows: list[dict[str, Any]] = []
    with Crew(policies, chosen.processes) as crew:
        several = f"at once, {chosen.processes} processes"
        arms: dict[str, tuple[dict[str, Policy] | Crew, int]] = {
            "one after another": (seats, 1),
            "at once": (seats, chosen.episodes),
            several: (crew, chosen.episodes),
        }
        for seated, concurrency in arms.values():
            run(problems[:8], seated, concurrency)
        for repeat in range(chosen.repeats):
            found = {arm: run(problems, *how) for arm, how in arms.items()}
            if len({tuple(answers) for _, answers in found.values()}) > 1:
                raise SystemExit("greedy answers differ between the arms; the comparison is void")
            rows += [{"repeat": repeat, "arm": arm, "episodes": chosen.episodes, "seconds": round(t, 3)} for arm, (t, _) in found.items()]
            print(f"repeat {repeat}: " + ", ".join(f"{arm} {seconds:.2f} s" for arm, (seconds, _) in found.items()), flush=True)
    times = {arm: [row["seconds"] for row in rows if row["arm"] == arm] for arm in arms}
    alone = times["one after another"]
    ratio = {arm: spread([a / b for a, b in zip(alone, times[arm], strict=True)]) for arm in ("at once", several)}
    for arm, value in ratio.items():
        print(f"{arm}: median {value['median']}, least {value['least']}, most {value['most']} (target {TARGET})")
    command = f"python bench/rollout.py --episodes {chosen.episodes} --repeats {chosen.repeats} --processes {chosen.processes}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {"name": "rollout", "command": command, "machine": machine, "rows": rows, "ratio": {**ratio, "target": TARGET}}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
