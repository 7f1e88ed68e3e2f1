"""A run that was written in other ids, once more in those of a student who is to imitate it.

A chat teacher's trace holds words and actions, not tokens that a student could learn from. The recorded actions are played again through
the same graph, as an oracle's are: the student's own codec puts them, and all that is heard between them, into its ids. What the codec has
no tokens for, replies that were no action, tools and enlarged regions are left out as whole episodes and counted; nothing is mended.
Nothing was sampled in these ids, so they carry no log-probs, and policy gradients refuse them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from monologue.agents.chat import ChatCodec
from monologue.agents.hosted import PLACEHOLDER, Marked, Transcript
from monologue.agents.load import codec_for
from monologue.agents.messages import Action, Conclude, Look, Reply, ToolUse
from monologue.agents.policy import Policy
from monologue.graphs.oracle import Seat, oracle
from monologue.graphs.play import play
from monologue.graphs.registry import find
from monologue.tasks.base import Problem
from monologue.traces.store import Episode, RunError, RunReader, read_info


@dataclass
class Drift:
    """What became of the episodes."""

    kept: int = 0
    """Said again in the student's ids."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Not, by cause."""


def retokenise(run: str | Path, out: str | Path, role: str, student: Policy) -> Drift:
    """Writes the run ``out``, in which ``role`` speaks the student's ids. Raises RunError where nothing can be said again, GraphError for a
    graph that is not registered, and for one run of several graphs.
    """
    reader, drift = RunReader(run), Drift()
    config = {"retokenised": reader.info["run_id"], "role": role}
    if (Path(out) / "run.json").is_file() and not config.items() <= read_info(out)["config"].items():
        raise RunError(f"{str(out)!r} holds another run than {role!r} of {str(run)!r} said again; name another folder, or remove it")
    problems: list[Problem] = []
    scripts: dict[str, Mapping[str, tuple[Action, ...]]] = {}
    graphs = set()
    for episode in reader.episodes():
        fault = _unfit(episode)
        if fault:
            drift.left_out[fault] += 1
            continue
        problem = _problem(reader, episode)
        problems.append(problem)
        scripts[problem.id] = _said(episode)
        graphs.add(episode.start.graph)
    if len(graphs) != 1:
        raise RunError(f"expected episodes of one graph in {str(run)!r}, got {sorted(graphs)}; left out: {dict(drift.left_out)}")
    graph = replace(find(graphs.pop()), oracle=lambda problem, **_: scripts[problem.id])
    engine: Any = student.backend
    seats: dict[str, Seat] = dict.fromkeys(graph.roles, oracle(ChatCodec(Transcript(), 1, PLACEHOLDER), Marked(), "recorded"))
    seats[role] = oracle(codec_for(engine.tokenizer, engine), engine if engine.facts.sees else None, f"recorded-{role}")
    turns = 1 + max(len(said) for script in scripts.values() for said in script.values())
    summary = play(graph, problems, seats, out, max_turns=turns, progress=False, config=config)
    drift.kept = summary.ok
    drift.left_out.update(str(one.error).partition(":")[0] for one in summary.failed)
    if not summary.ok:
        raise RunError(f"nothing of {str(run)!r} can be said in the student's ids: {summary.failed[0].error}")
    return drift


def _unfit(episode: Episode) -> str:
    """Why an episode cannot be said again; empty where it can."""
    if not episode.complete:
        return "failed or unfinished"
    actions = [json.loads(call.action or "{}") for call in episode.calls()]
    if not all(actions):
        return "a reply that was no action"
    return "an enlarged region" if any("region" in one for one in actions) else ""


def _problem(reader: RunReader, episode: Episode) -> Problem:
    start = episode.start
    seen = {image.sha256: None for call in episode.calls() for image in call.images}
    pictures = tuple(partial(reader.picture, sha256) for sha256 in seen)
    name = f"{start.problem_id}#{start.sample_index}" if start.sample_index else start.problem_id
    return Problem(name, start.task, start.question, start.choices, start.gold, pictures, family=start.family)


def _said(episode: Episode) -> dict[str, tuple[Action, ...]]:
    found: dict[str, list[Action]] = defaultdict(list)
    for call in episode.calls():
        found[call.role].append(_action(json.loads(call.action or "{}")))
    return {role: tuple(actions) for role, actions in found.items()}


def _action(plain: dict[str, Any]) -> Action:
    """Inverse of ``monologue.agents.messages.plain``."""
    kind = {"look": Look, "conclude": Conclude, "tool": ToolUse, "reply": Reply}[plain.pop("kind")]
    made: Action = kind(**plain)
    return made
