"""The inner monologue: a questioner that never sees asks, an answerer that sees replies, until the questioner concludes.

    START -> ask -> answer -> ask -> ... -> END
             ask -> tools -> ask                for the builder's tools
             ask -> ask                         after a correction

With ``looks=None`` stopping is learned: the questioner's own action ends the episode, and the budget is a hard stop without
an answer. With ``looks=k`` it asks exactly k questions and must then conclude, as in IMMO; the kind of each action is fixed
by its first token, its content is the policy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.graph import END, START, StateGraph

from monologue.agents.codec import Force
from monologue.agents.messages import Action, Conclude, Look, Reply
from monologue.graphs import nodes
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.base import Problem


def build(looks: int | None = None) -> Any:
    """The compiled graph. ``looks`` is the number of questions, None leaves it to the policy."""
    if looks is not None and looks < 0:
        raise GraphError(f"looks must be 0 or more, or None for a learned stop, got {looks!r}")

    def force(state: State) -> Force | None:
        if looks is None:
            return None
        return "look" if state.get("looks", 0) < looks else "conclude"

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("ask", nodes.ask(force), destinations=("answer", "tools", "ask", END))
    graph.add_node("answer", nodes.answer(), destinations=("ask",))
    graph.add_node("tools", nodes.tools(), destinations=("ask",))
    graph.add_edge(START, "ask")
    return graph.compile(name="monologue")


def oracle(problem: Problem) -> Mapping[str, tuple[Action, ...]]:
    """What perfect policies say: the problem's own look-ups with their true replies, then gold."""
    if problem.oracle is None or problem.gold is None:
        raise GraphError(f"problem {problem.id!r} has no oracle monologue; the oracle can only play problems that come with one")
    looks = tuple(Look(turn.question) for turn in problem.oracle)
    ends = Conclude(problem.choices[problem.gold], problem.explanation)
    return {"questioner": (*looks, ends), "answerer": tuple(Reply(turn.reply) for turn in problem.oracle)}
