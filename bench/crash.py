"""What a run loses when its processes are killed, and what eight writers do to one another.

    python bench/crash.py [--kills 200] [--writers 8] [--json bench/results/crash.json]

A child plays turns with pictures into a run and says of each, on its standard output, when the span has ended. It is killed (SIGKILL) at a
random moment; every turn that it had called finished must be in the run, at worst one torn last line a kill may follow it, and readers must
count that. All kills strike one run. Then eight children write one run at once to their end; every turn of each must be there, whole and in
order. It can lose: a store that buffers loses turns here, one that writes in pieces tears more than last lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from monologue.traces.store import RunReader

ROOT = Path(__file__).parent.parent
CHILD = """
import random, sys
from PIL import Image
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunWriter
run, name, episodes = sys.argv[1], sys.argv[2], int(sys.argv[3])
recorder = Recorder(RunWriter(run, resume=True))
sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "max_tokens": 128}
facts = dict(policy_id="p", weights_version="0", trainable=True, engine="e", engine_version="1", model="m", tokenizer_hash="t",
    template_hash="c", finish_reason="stop", truncated=False, images=(), messages=(), output="x" * 200, action=None, parse_error=None,
    cached_tokens=None, sampling=sampling)
dice = random.Random(name)
for number in range(episodes):
    with recorder.episode(problem_id=f"{name}/{number}", task="t", graph="g", group_id="g", question="q") as episode:
        ids = tuple(dice.randrange(150000) for _ in range(600))
        for turn in range(6):
            episode.store(Image.new("RGB", (84, 84), tuple(dice.randrange(256) for _ in range(3))))
            said = tuple(dice.randrange(150000) for _ in range(60))
            with episode.policy(role="a", node="n") as span:
                span.record(prompt_ids=ids, sampled_ids=said, sampled_logprobs=(-0.5,) * 60, loss_mask=bytes(60), **facts)
            ids += said + (1, 2, 3)
            sys.stdout.write(f"{name}/{number} {turn}\\n")
            sys.stdout.flush()
        episode.finish("a")
"""


def child(run: Path, name: str, episodes: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(run), name, str(episodes)], stdout=subprocess.PIPE, env=environment)


def finished(process: subprocess.Popen[bytes]) -> set[tuple[str, int]]:
    """The turns that the child has called finished; a line cut by the kill does not count."""
    assert process.stdout is not None
    lines = process.stdout.read().split(b"\n")[:-1]
    return {(line.split()[0].decode(), int(line.split()[1])) for line in lines}


def stored(run: Path) -> tuple[Counter[tuple[str, int]], int]:
    """Turns in the run, and torn last lines."""
    reader = RunReader(run)
    found = Counter((episode.start.problem_id, call.turn) for episode in reader.episodes() for call in episode.calls())
    return found, reader.torn


def kill_often(run: Path, kills: int, dice: random.Random) -> dict[str, int]:
    claimed: set[tuple[str, int]] = set()
    for number in range(kills):
        process = child(run, f"kill{number}", 10**6)
        assert process.stdout is not None
        process.stdout.peek(1)  # type: ignore[attr-defined]  # it has begun
        time.sleep(dice.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        claimed |= finished(process)
    found, torn = stored(run)
    doubled = sum(count > 1 for count in found.values())
    return {"kills": kills, "turns": len(claimed), "lost": len(claimed - set(found)), "doubled": doubled, "torn last lines": torn}


def write_together(run: Path, writers: int) -> dict[str, int]:
    processes = [child(run, f"writer{number}", 30) for number in range(writers)]
    claimed = set().union(*(finished(process) for process in processes))
    assert all(process.wait() == 0 for process in processes)
    found, torn = stored(run)
    doubled = sum(count > 1 for count in found.values())
    return {"writers": writers, "turns": len(claimed), "lost": len(claimed - set(found)), "doubled": doubled, "torn last lines": torn}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--writers", type=int, default=8)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "crash.json")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            kill_often(Path(folder) / "kills", chosen.kills, random.Random(chosen.seed)),
            write_together(Path(folder) / "together", chosen.writers),
        ]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    command = f"python bench/crash.py --kills {chosen.kills} --writers {chosen.writers} --seed {chosen.seed}"
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    lost = sum(row["lost"] + row["doubled"] for row in rows)
    result = {"name": "crash", "command": command, "machine": machine, "rows": rows, "ratio": {"lost or doubled": lost, "target": 0}}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    if lost:
        raise SystemExit(f"{lost} turns were lost or doubled")


if __name__ == "__main__":
    main()
