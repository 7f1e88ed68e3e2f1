"""The question alone: the questioner concludes without a look. What it gets right, it guesses from words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.graph import END, START, StateGraph

from monologue.agents.messages import Action, Conclude
from monologue.graphs.nodes import conclude
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.base import Problem


def build() -> Any:
    """The compiled graph."""
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("ask", conclude(), destinations=("ask", END))
    graph.add_edge(START, "ask")
    return graph.compile(name="blind")


def oracle(problem: Problem) -> Mapping[str, tuple[Action, ...]]:
    """Gold at once."""
    if problem.gold is None:
        raise GraphError(f"problem {problem.id!r} has no gold answer for the oracle to give")
    return {"questioner": (Conclude(problem.choices[problem.gold], problem.explanation),)}
