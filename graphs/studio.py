"""The monologue behind LangGraph's own server: ``langgraph dev`` finds ``monologue`` here by ``langgraph.json``.

A server hands in JSON, so this graph takes a question, choices and the path of a picture, seats the policies that the
environment names, plays one episode, and answers with JSON. The episode is recorded like any other, in a run of its own.

    MONOLOGUE_QUESTIONER, MONOLOGUE_ANSWERER   model folders or Hub names; the starter policies when not set
    MONOLOGUE_PICTURES                         the folder that pictures may come from; the working directory when not set
    MONOLOGUE_RUNS                             where runs are written; ``runs`` when not set
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph

from monologue.agents.load import load_policy
from monologue.backends.places import PREFIX
from monologue.graphs.oracle import Seat
from monologue.graphs.play import play
from monologue.graphs.state import GraphError
from monologue.tasks.own import own_problem
from monologue.traces.images import open_picture

ROLES = ("questioner", "answerer")


class Asked(TypedDict, total=False):
    """What the server is given."""

    question: str
    """The question."""
    choices: list[str]
    """Answers to choose from."""
    image: str
    """Path of the picture, inside the allowed folder."""


class Told(TypedDict, total=False):
    """What it answers."""

    answer: str | None
    """The conclusion; None where the budget ended first."""
    run: str
    """The run folder that holds the trace."""


class Exchange(Asked, Told):
    """Both."""


_seats: dict[str, Seat] = {}


def monologue() -> Any:
    """What ``langgraph dev`` calls; the policies are loaded at the first question."""
    return build()


def build(seats: Mapping[str, Seat] | None = None) -> Any:
    """The compiled graph; without ``seats`` the environment names them. A server may not block, so episodes run in threads."""

    async def episode(state: Exchange) -> Exchange:
        return await asyncio.to_thread(_episode, state, seats)

    graph = StateGraph(Exchange, input_schema=Asked, output_schema=Told)
    graph.add_node("monologue", episode)
    graph.add_edge(START, "monologue")
    graph.add_edge("monologue", END)
    return graph.compile(name="monologue")


def _episode(state: Exchange, seats: Mapping[str, Seat] | None) -> Exchange:
    missing = [name for name in ("question", "choices", "image") if not state.get(name)]
    if missing:
        raise GraphError(f"expected question, choices and image, got no {' and no '.join(missing)}")
    picture = open_picture(_allowed(state["image"]))
    run = Path(os.environ.get("MONOLOGUE_RUNS", "runs")) / f"studio-{uuid.uuid4().hex[:8]}"
    problem = own_problem(lambda: picture, state["question"], state["choices"])
    summary = play("monologue", [problem], seats or _from_environment(), run, progress=False)
    for failure in summary.failed:
        raise GraphError(f"the episode failed: {failure.error}")
    return {"answer": summary.episodes[0].answer, "run": str(run)}


def _from_environment() -> Mapping[str, Seat]:
    for role in ROLES:
        if role not in _seats:
            _seats[role] = load_policy(os.environ.get(f"MONOLOGUE_{role.upper()}", f"{PREFIX}{role}"), role)
    return _seats


def _allowed(path: str) -> Path:
    root = Path(os.environ.get("MONOLOGUE_PICTURES", ".")).resolve()
    found = (root / path).resolve()
    if not found.is_relative_to(root):
        raise GraphError(f"pictures come from {str(root)!r} only, got {path!r}; set MONOLOGUE_PICTURES to another folder")
    return found
