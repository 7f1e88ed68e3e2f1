"""What dialogues of many turns cost where a stream is one row, and where every call is a row and a prompt of its own.

    python bench/turns.py [--turns 1 4 8] [--episodes 64] [--repeats 3] [--json bench/results/turns.json]

The shipped pair plays ``monologue:looks=T``, sampled; then one iteration of learning is done for both roles: the pass that proves the
batch, forward, backward, one step of AdamW. Every other episode is praised, the others blamed, so that all rows count. Everything is equal
but this:

    streams   the engine keeps keys and values of a stream for its next turn; a stream is one training row
    calls     the engine reads every prompt from its beginning; each call is a row, as trainers do that know single turns only

The two must be the same experience and the same step: ids are compared one by one, gradients by the norm of their difference. ``ratio`` is
seconds of calls over seconds of streams. What a trainer of single turns does beside that (bench/train.py) is not in these figures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from monologue.agents.load import load_policy
from monologue.backends.base import Sampling
from monologue.graphs.play import play
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from monologue.training.collate import Collate
from monologue.training.credit import at_turns
from monologue.training.experience import deal, lessons, over
from monologue.training.objectives import Grpo
from monologue.training.policies import Learner, Policies
from monologue.training.rows import Row, ordered, read_rows

ROLES = ("questioner", "answerer")
KEPT = {"streams": 1 << 20, "calls": 0}
"""Tokens whose keys and values the engine may keep."""
TOGETHER = 8192
"""Padded tokens of a micro-batch at most, about."""


def played(run: Path, arm: str, turns: int, episodes: int) -> float:
    """Seconds of a play."""
    sampling = Sampling(temperature=1.0, max_tokens=24)
    engine: dict[str, Any] = {"max_batch": 128, "prefix_tokens": KEPT[arm]}
    seats = {role: load_policy(starter(role), role, sampling=sampling, **engine) for role in ROLES}
    problems = list(Shapes(["near"]).problems("train", episodes // 4))
    play(f"monologue:looks={turns}", problems[:1], seats, run.with_name(f"{run.name}-warm"), progress=False)
    started = time.perf_counter()
    play(f"monologue:looks={turns}", problems, seats, run, samples=4, concurrency=128, max_turns=4 * turns + 4, progress=False)
    return time.perf_counter() - started


def learned(run: Path, role: str, merge: bool) -> tuple[float, torch.Tensor, int, int]:
    """Seconds of one iteration of learning, the gradient, ids read, ids sampled."""
    reader, learner = RunReader(run), Learner.open(str(starter(role)))
    policies, collate = Policies({role: learner}), Collate(learner.inputs, reader.picture)
    optimizer = torch.optim.AdamW(learner.trained, lr=1e-5)
    rows: list[Row] = ordered(list(read_rows(reader, [role], merge=merge)))
    whole = ordered(list(read_rows(reader, [role])))
    advantages = {piece.span_id: 1.0 - 2.0 * (row.sample_index % 2) for row in whole for piece in row.pieces}
    read, longest = sum(len(row.ids) for row in rows), max(len(row.ids) for row in rows)
    started = time.perf_counter()
    seen = dict(zip(("old", "entropy"), over(rows, collate, lambda batch: _seen(policies, role, batch), TOGETHER // longest), strict=True))
    found, _ = lessons(role, rows, Grpo(), advantages, at_turns(whole), seen, learner.checkpoint.version, 0.0, 1e-3)
    for micro in deal(found, {role: collate}, 1, math.ceil(longest * len(rows) / TOGETHER), (0, 1), "0", True):
        scored, _ = policies(role, micro.batch)
        Grpo().loss(scored.logprobs, micro.part, micro.count, None, 0.0).backward()
    optimizer.step()
    seconds = time.perf_counter() - started
    gradient = torch.cat([one.grad.flatten() for one in learner.trained if one.grad is not None])
    return seconds, gradient, read, sum(sum(row.mask) for row in rows)


def _seen(policies: Policies, role: str, batch: Any) -> tuple[torch.Tensor, ...]:
    scored, _ = policies(role, batch, True)
    assert scored.entropies is not None
    return scored.logprobs, scored.entropies


def said(run: Path) -> dict[Any, Any]:
    """What was sampled, by problem, sample, stream and turn."""
    return {
        (episode.start.problem_id, episode.start.sample_index, call.stream, call.turn): call.sampled_ids
        for episode in RunReader(run).episodes()
        for call in episode.calls()
    }


def measure(turns: int, episodes: int, folder: Path) -> dict[str, Any]:
    """Both arms once, one after the other."""
    row: dict[str, Any] = {"turns": turns, "episodes": episodes}
    for arm in KEPT:
        row[f"{arm} play"] = round(played(folder / arm, arm, turns, episodes), 3)
    one, other = (said(folder / arm) for arm in KEPT)
    row["same ids"] = sum(other[key] == ids for key, ids in one.items()) / len(other)
    gradients: dict[str, list[torch.Tensor]] = {}
    for arm in KEPT:
        parts = [learned(folder / "streams", role, arm == "streams") for role in ROLES]
        row[f"{arm} learn"], gradients[arm] = round(sum(part[0] for part in parts), 3), [part[1] for part in parts]
        row[f"{arm} ids read"], row["sampled"] = sum(part[2] for part in parts), sum(part[3] for part in parts)
    row["gradients apart"] = max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients.values(), strict=True))
    for part in ("play", "learn"):
        row[f"{part} ratio"] = round(row[f"calls {part}"] / row[f"streams {part}"], 3)
    whole = {arm: row[f"{arm} play"] + row[f"{arm} learn"] for arm in KEPT}
    return {**row, "ratio": round(whole["calls"] / whole["streams"], 3)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--turns", type=int, nargs="+", default=[1, 4, 8])
    options.add_argument("--episodes", type=int, default=64)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "turns.json")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows = []
    for repeat in range(chosen.repeats):
        for turns in chosen.turns:
            with tempfile.TemporaryDirectory() as scratch:
                rows.append({"repeat": repeat, **measure(turns, chosen.episodes, Path(scratch))})
            print(json.dumps(rows[-1]), flush=True)
    ratio = {}
    for turns in chosen.turns:
        mine = [row for row in rows if row["turns"] == turns]
        medians = {name: round(statistics.median(row[f"{name}ratio"] for row in mine), 2) for name in ("", "play ", "learn ")}
        ratio[f"{turns} turns"] = {(name or "both").strip(): value for name, value in medians.items()}
    print(json.dumps(ratio, indent=1))
    command = f"python bench/turns.py --turns {' '.join(map(str, chosen.turns))} --episodes {chosen.episodes} --repeats {chosen.repeats}"
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    chosen.json.write_text(
        json.dumps({"name": "turns", "command": command, "machine": machine, "rows": rows, "ratio": ratio}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
