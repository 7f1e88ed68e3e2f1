"""From a run to training rows: speed, memory, and what merging saves.

    python bench/rows.py [--episodes 10000] [--repeats 3] [--gigabytes 1.0] [--json bench/results/rows.json]

Four questions, each in processes of its own so that peak memory is that of the pass alone:

    record    what writing costs: milliseconds and bytes a policy call, pictures aside
    rows      dialogues of 6 turns (3 of a questioner, 3 of an answerer with a picture in its prompt): rows a second, peak memory, and
              the ids that one row a call would have had
    turns     one dialogue of T turns, T = 2 .. 64: ids in merged rows against one row a call, and their ratio
    gigabyte  a run of so many gigabytes opened, filtered (right answers of one role) and converted: seconds, peak memory

Ids are drawn at random with the lengths of a small VLM's dialogue (600 in the first prompt, 60 sampled a turn). It can lose: a reader that
holds the run in memory fails the last question, one that merges nothing has a ratio of 1 in the second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from monologue.traces.recorder import Recorder
from monologue.traces.schema import ImageRef
from monologue.traces.store import RunWriter

ROOT = Path(__file__).parent.parent
PASS = """
import json, resource, sys, time
from monologue.training.rows import Counts, read_rows
run, roles = sys.argv[1], sys.argv[2].split(",")
started, counts, kept = time.perf_counter(), Counts(), 0
for row in read_rows(run, roles=roles, counts=counts):
    kept += row.reward("exact_match") == 1.0
print(json.dumps({"seconds": time.perf_counter() - started, "rows": counts.rows, "kept": kept, "tokens": counts.tokens,
    "per_call": counts.per_call, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""
FACTS: dict[str, Any] = {
    **{"policy_id": "p", "weights_version": "0", "trainable": True, "engine": "e", "engine_version": "1", "model": "m"},
    **{"tokenizer_hash": "t", "template_hash": "c", "finish_reason": "stop", "truncated": False, "messages": (), "output": "x" * 240},
    **{"action": '{"kind": "reply", "text": "x"}', "parse_error": None, "cached_tokens": None},
    "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "max_tokens": 128},
}
ROLES = ("questioner", "answerer")


def write_episode(recorder: Recorder, number: int, turns: int, dice: random.Random) -> float:
    """One dialogue: roles take turns, every prompt extends the role's own stream. Returns the seconds that recording the calls took."""
    seconds = 0.0
    streams = {role: [dice.randrange(150000) for _ in range(600)] for role in ROLES}
    with recorder.episode(
        problem_id=f"p{number}", task="t", graph="g", group_id=f"p{number}", question="q", choices=("a",), gold=0
    ) as episode:
        picture = episode.store(Image.new("RGB", (28, 28), (number % 256, number // 256 % 256, 7)))
        seen = (ImageRef(picture.sha256, 28, 28, (1, 2, 2), 3, 1, "h"),)
        for turn in range(turns):
            role = ROLES[turn % 2]
            ids, said = streams[role], tuple(dice.randrange(150000) for _ in range(60))
            images, started = seen if role == "answerer" else (), time.perf_counter()
            with episode.policy(role=role, node="n") as span:
                span.record(
                    prompt_ids=tuple(ids), sampled_ids=said, sampled_logprobs=(-0.5,) * 60, loss_mask=b"\1" * 60, images=images, **FACTS
                )
            seconds += time.perf_counter() - started
            ids += [*said, *(dice.randrange(150000) for _ in range(20))]
        episode.annotate(name="exact_match", value=float(number % 3 == 0), source="t")
        episode.finish("a")
    return seconds


def write_run(run: Path, episodes: int, turns: int) -> dict[str, float]:
    writer, dice = RunWriter(run), random.Random(0)
    recorder = Recorder(writer)
    seconds = sum(write_episode(recorder, number, turns, dice) for number in range(episodes))
    writer.close()
    size = sum(file.stat().st_size for file in (run / "spans").iterdir())
    calls = episodes * turns
    return {"megabytes": round(size / 1e6, 3), "bytes_per_call": round(size / calls), "ms_per_call": round(1000 * seconds / calls, 4)}


def read(run: Path, roles: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PASS, str(run), roles], capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "least": round(min(values), 1), "most": round(max(values), 1)}


def ask_rows(folder: Path, episodes: int, repeats: int) -> dict[str, Any]:
    size = write_run(folder / "rows", episodes, 6)
    passes = [read(folder / "rows", ",".join(ROLES)) for _ in range(repeats)]
    facts = {name: passes[0][name] for name in ("rows", "tokens", "per_call")}
    rate = spread([one["rows"] / one["seconds"] for one in passes])
    return {
        "question": "rows",
        "episodes": episodes,
        **size,
        **facts,
        "rows_per_second": rate,
        "peak_mb": spread([p["peak_mb"] for p in passes]),
    }


def ask_record(folder: Path, repeats: int) -> dict[str, Any]:
    sizes = [write_run(folder / f"record{repeat}", 200, 6) for repeat in range(max(3, repeats))]
    times = [size["ms_per_call"] for size in sizes]
    ms = {"median": statistics.median(times), "least": min(times), "most": max(times), "target": 0.25}
    return {"question": "record", "calls": 1200, "bytes_per_call": sizes[0]["bytes_per_call"], "target_bytes": 8192, "ms_per_call": ms}


def ask_turns(folder: Path) -> list[dict[str, Any]]:
    found = []
    for turns in (2, 4, 8, 16, 32, 64):
        run = folder / f"turns{turns}"
        write_run(run, 4, turns)
        one = read(run, ",".join(ROLES))
        share = one["per_call"] / one["tokens"]
        found.append({"question": "turns", "turns": turns, "merged": one["tokens"], "per_call": one["per_call"], "ratio": round(share, 2)})
    return found


def ask_gigabyte(folder: Path, gigabytes: float) -> dict[str, Any]:
    per_episode = write_run(folder / "probe", 50, 6)["megabytes"] / 50
    started = time.perf_counter()
    size = write_run(folder / "gigabyte", round(gigabytes * 1000 / per_episode), 6)
    writing = time.perf_counter() - started
    one = read(folder / "gigabyte", "questioner")
    return {"question": "gigabyte", **size, "writing_seconds": round(writing, 1), **{name: round(value, 1) for name, value in one.items()}}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--episodes", type=int, default=10000)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--gigabytes", type=float, default=1.0)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "rows.json")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            ask_rows(Path(folder), chosen.episodes, chosen.repeats),
            *ask_turns(Path(folder)),
            ask_gigabyte(Path(folder), chosen.gigabytes),
        ]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    command = f"python bench/rows.py --episodes {chosen.episodes} --repeats {chosen.repeats} --gigabytes {chosen.gigabytes}"
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    ratio = {"per call over merged at 64 turns": rows[-2]["ratio"], "peak MB for the gigabyte": rows[-1]["peak_mb"], "target MB": 500}
    result = {"name": "rows", "command": command, "machine": machine, "rows": rows, "ratio": ratio}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
