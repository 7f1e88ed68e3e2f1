"""One shot: a policy that sees the picture is asked the problem itself. The rival that every monologue must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.graph import END, START, StateGraph

from monologue.agents import answerer, questioner
from monologue.agents.messages import Action, Message, ParseFault, Reply
from monologue.graphs.nodes import Step, entry, policy_node
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.base import Problem


def hear(state: State, context: Context) -> list[Message]:
    """The problem with its pictures, or a correction."""
    wording = context.wording("answerer")
    if context.opened("answerer"):
        return questioner.corrected(wording, ParseFault(state["heard"]["reason"], state["heard"]["text"]))
    return answerer.direct(wording, state["question"], state.get("choices", ()), context.pictures)


def hear_look(state: State, context: Context) -> list[Message]:
    """The question alone, as a monologue would ask it first, or a correction."""
    if context.opened("answerer"):
        return hear(state, context)
    return answerer.opening(context.wording("answerer"), state["question"], context.pictures)


def then(state: State, action: Action | ParseFault, context: Context) -> Step:
    """The reply is the answer."""
    asked = state.get("asked", 0) + 1
    update = {"asked": asked, "dialogue": [entry("answerer", action)]}
    if isinstance(action, Reply):
        return Step({**update, "answer": action.text}, END, "conclude")
    assert isinstance(action, ParseFault)
    if asked >= context.max_turns:
        return Step(update, END, "out_of_turns")
    return Step({**update, "heard": {"kind": "fault", "reason": action.reason, "text": action.text}}, "answer", "correct")


def build(choices: bool = True) -> Any:
    """The compiled graph; without ``choices`` the policy is asked the bare question, as one look of a monologue (graph ``look``)."""
    graph = StateGraph(State, context_schema=Context)
    node = policy_node("answer", "answerer", hear if choices else hear_look, then, answerer.KINDS)
    graph.add_node("answer", node, destinations=("answer", END))
    graph.add_edge(START, "answer")
    return graph.compile(name="direct" if choices else "look")


def build_look() -> Any:
    """One look."""
    return build(choices=False)


def oracle(problem: Problem, choices: int = 1) -> Mapping[str, tuple[Action, ...]]:
    """Gold at once."""
    if problem.gold is None:
        raise GraphError(f"problem {problem.id!r} has no gold answer for the oracle to give")
    return {"answerer": (Reply(problem.choices[problem.gold]),)}
