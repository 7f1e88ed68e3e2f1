"""Several graphs on the same held-out problems: one row each, with standard error, chance, families, cost.

An episode that fails counts as wrong: leaving it out would reward a policy that breaks on what it cannot do.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monologue.asked import check_turns
from monologue.graphs.play import check_control as check
from monologue.graphs.registry import find, listed
from monologue.graphs.summary import Played
from monologue.seating import config_of, player
from monologue.tables import table
from monologue.tasks.base import Problem, Score, Task, by_family, by_hops, summarize, taken


def evaluate_graphs(options: argparse.Namespace, task: Task, out: Path) -> list[dict[str, Any]]:
    """Plays every graph of ``options.graph``; prints the table and returns its rows."""
    problems = taken(task, options.split, options.n)
    check_turns(options, problems)
    graphs = listed(options.graph)
    for name in graphs:
        check(find(name), options.control)
    rows = [_evaluate(name, options, task, problems, out) for name in graphs]
    heads = ["graph", "n", "accuracy", "± stderr", "chance", "turns", "tokens", "seconds", "failed"]
    table(heads, [_cells(row) for row in rows])
    heads = ["family or hops", "chance", *(row["graph"] for row in rows)]
    table(heads, [_part(kind, name, rows) for kind in ("by_family", "by_hops") for name in rows[0][kind]])
    return rows


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cells(row: dict[str, Any]) -> list[str]:
    rates = [_rate(row[name]) for name in ("accuracy", "stderr", "chance")]
    return [row["graph"], str(row["n"]), *rates, f"{row['turns']:.2f}", f"{row['tokens']:.1f}", f"{row['seconds']:.1f}", str(row["failed"])]


def _part(kind: str, name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    label = name if kind == "by_family" else "multi-hop" if name == "multi" else f"{name} hop{'s' * (name != '1')}"
    cells = [f"{_rate(row[kind][name]['accuracy'])} ± {_rate(row[kind][name]['stderr'])}" for row in rows]
    return [label, f"{rows[0][kind][name]['chance']:.3f}", *cells]


def _evaluate(graph: str, options: argparse.Namespace, task: Task, problems: list[Problem], out: Path) -> dict[str, Any]:
    label = graph.replace(":", "-") + (f"-{options.control}" if options.control else "")
    with player(graph, options) as play:
        started = time.perf_counter()
        summary = play(
            problems,
            out / label,
            concurrency=options.concurrency,
            seed=options.seed,
            max_turns=options.max_turns,
            control=options.control,
            score=task.score,
            config=config_of(options),
        )
        seconds = time.perf_counter() - started
    for episode in summary.failed[:3]:
        print(f"monologue: {graph}: {episode.problem_id} failed: {episode.error}", file=sys.stderr)
    return _row(graph, options, problems, summary.episodes, seconds)


def _row(graph: str, options: argparse.Namespace, problems: list[Problem], episodes: list[Played], seconds: float) -> dict[str, Any]:
    scores = {episode.problem_id: episode.score or 0.0 for episode in episodes}
    points = [scores[problem.id] for problem in problems]
    whole = summarize(points, [1 / len(problem.choices) for problem in problems])
    n = len(episodes)
    return {
        "graph": graph,
        "task": options.task,
        "split": options.split,
        "control": options.control,
        **_plain(whole),
        "by_hops": {name: _plain(score) for name, score in by_hops(problems, points).items()},
        "by_family": {name: _plain(score) for name, score in by_family(problems, points).items()},
        "turns": math.fsum(episode.turns for episode in episodes) / n,
        "tokens": math.fsum(episode.tokens for episode in episodes) / n,
        "seconds": seconds,
        "failed": sum(episode.status != "ok" for episode in episodes),
        "unanswered": sum(episode.status == "ok" and episode.answer is None for episode in episodes),
    }


def _plain(score: Score) -> dict[str, Any]:
    return {"n": score.n, "accuracy": score.accuracy, "stderr": score.stderr, "chance": score.chance}
