"""Caption first, then conclude: the answerer describes the picture without knowing the question, the questioner concludes
from that alone.

Tells what asking is worth: the same two policies with the same budget of one picture, but no questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.graph import END, START, StateGraph

from monologue.agents import answerer, questioner
from monologue.agents.messages import Action, Message, ParseFault, Reply
from monologue.graphs.nodes import Step, conclude, entry, policy_node
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.base import Problem


def hear(state: State, context: Context) -> list[Message]:
    """The pictures and the wish for a description, or a correction."""
    wording = context.wording("answerer")
    if context.opened("answerer"):
        return questioner.corrected(wording, ParseFault(state["heard"]["reason"], state["heard"]["text"]))
    return answerer.opening(wording, wording.caption, context.pictures)


def then(state: State, action: Action | ParseFault, context: Context) -> Step:
    """The description goes to the questioner."""
    update = {"dialogue": [entry("answerer", action)]}
    if isinstance(action, Reply):
        return Step({**update, "heard": {"kind": "caption", "text": action.text}}, "ask", "reply")
    assert isinstance(action, ParseFault)
    asked = state.get("asked", 0) + 1
    if asked >= context.max_turns:
        return Step({**update, "asked": asked}, END, "out_of_turns")
    heard = {"kind": "fault", "reason": action.reason, "text": action.text}
    return Step({**update, "asked": asked, "heard": heard}, "caption", "correct")


def build() -> Any:
    """The compiled graph."""
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("caption", policy_node("caption", "answerer", hear, then, answerer.KINDS), destinations=("ask", "caption", END))
    graph.add_node("ask", conclude(), destinations=("ask", END))
    graph.add_edge(START, "caption")
    return graph.compile(name="caption")


def oracle(problem: Problem) -> Mapping[str, tuple[Action, ...]]:
    """Problems carry true replies to questions, but no true caption."""
    raise GraphError("problems come without an oracle caption, so the oracle cannot play the graph 'caption'; play 'monologue' with it")
