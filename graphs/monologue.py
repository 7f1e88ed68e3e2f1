"""The inner monologue: a questioner that never sees asks, an answerer that sees replies, until the questioner concludes.

    START -> ask -> answer -> ask -> ... -> END
             ask -> tools -> ask                for the builder's tools
             ask -> ask                         after a correction
    START -> caption -> ask ...                 with ``caption=1``

With ``looks=None`` stopping is learned: the questioner's own action ends the episode, and the budget is a hard stop without
an answer. With ``looks=k`` it asks exactly k questions and must then conclude, as in IMMO; the kind of each action is fixed
by its first token, its content is the policy's. With ``caption=1`` the answerer first describes the picture, and the questioner hears that
beside the question, as IMMO's does; together they are the paper's setting, ``monologue:looks=2,caption=1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.graph import END, START, StateGraph

from monologue.agents import answerer
from monologue.agents.codec import Force
from monologue.agents.messages import Action, Conclude, Look, Reply
from monologue.graphs import caption as describing
from monologue.graphs import nodes
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.base import Problem


def build(looks: int | None = None, caption: int = 0) -> Any:
    """The compiled graph. ``looks`` is the number of questions, None leaves it to the policy; ``caption`` is 1 for a description first."""
    if looks is not None and looks < 0:
        raise GraphError(f"looks must be 0 or more, or None for a learned stop, got {looks!r}")
    if caption not in (0, 1):
        raise GraphError(f"caption must be 0 or 1, got {caption!r}")

    def force(state: State) -> Force | None:
        if looks is None:
            return None
        return "look" if state.get("looks", 0) < looks else "conclude"

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("ask", nodes.ask(force), destinations=("answer", "tools", "ask", END))
    graph.add_node("answer", nodes.answer(), destinations=("ask",))
    graph.add_node("tools", nodes.tools(), destinations=("ask",))
    if caption:
        first = nodes.policy_node("caption", "answerer", describing.hear, describing.then, answerer.KINDS)
        graph.add_node("caption", first, destinations=("ask", "caption", END))
    graph.add_edge(START, "caption" if caption else "ask")
    return graph.compile(name="monologue")


def oracle(problem: Problem, looks: int | None = None, caption: int = 0) -> Mapping[str, tuple[Action, ...]]:
    """What perfect policies say: the problem's own look-ups with their true replies, then gold. Problems come without a true caption, so
    where one is wanted only the questioner is perfect.
    """
    if problem.oracle is None or problem.gold is None:
        raise GraphError(f"problem {problem.id!r} has no oracle monologue; the oracle can only play problems that come with one")
    asked = tuple(Look(turn.question) for turn in problem.oracle)
    told: dict[str, tuple[Action, ...]] = {"questioner": (*asked, Conclude(problem.choices[problem.gold], problem.explanation))}
    return told if caption else {**told, "answerer": tuple(Reply(turn.reply) for turn in problem.oracle)}
