"""Thought before spoken: a thinker answers after latent steps, and only where it is unsure the inner monologue is held out loud.

    START -> think -> END                       sure of its answer
             think -> ask -> answer -> ask ...   unsure, or its reply was no answer: the monologue, as ever

Sure means that the probability of the whole answer, as it was sampled, is at least ``percent`` per cent; 0 trusts every answer and needs
the other two seats for faults only, 101 trusts none. The thinker's latent steps stand as events on its span. Its calls are not trainable
from traces: states between prompt and reply are no ids that a row could hold (``monologue train latent`` teaches thinkers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command

from monologue.agents import answerer
from monologue.agents.messages import Action, Reply
from monologue.graphs import monologue, nodes
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.base import Problem

ROLE = "thinker"


def think(percent: int) -> nodes.Node:
    """The thinker's node."""

    async def run(state: State, runtime: Runtime[Context]) -> Command[str]:
        context = runtime.context
        with context.turn(ROLE, "think") as turn:
            heard = answerer.direct(context.wording(ROLE), state["question"], state.get("choices", ()), context.pictures)
            action = await turn.act(heard, answerer.KINDS)
            chance = 1.0 if turn.logprobs is None else math.exp(math.fsum(turn.logprobs))
            said = {"dialogue": [nodes.entry(ROLE, action)]}
            if isinstance(action, Reply) and 100 * chance >= percent:
                turn.span.edge = "conclude"
                return Command(update={**said, "answer": action.text}, goto=END)
            turn.span.edge = "unsure"
            return Command(update=said, goto="ask")

    return nodes.checked(run)


def build(percent: int = 50) -> Any:
    """The compiled graph."""
    if not 0 <= percent <= 101:
        raise GraphError(f"percent must lie from 0 (trusts every answer) to 101 (trusts none), got {percent!r}")
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("think", think(percent), destinations=("ask", END))
    graph.add_node("ask", nodes.ask(), destinations=("answer", "tools", "ask", END))
    graph.add_node("answer", nodes.answer(), destinations=("ask",))
    graph.add_node("tools", nodes.tools(), destinations=("ask",))
    graph.add_edge(START, "think")
    return graph.compile(name="latent")


def oracle(problem: Problem, percent: int = 50) -> Mapping[str, tuple[Action, ...]]:
    """Gold at once; the others say their part of the monologue where they are asked."""
    if problem.gold is None:
        raise GraphError(f"problem {problem.id!r} has no gold answer for the oracle to give")
    return {ROLE: (Reply(problem.choices[problem.gold]),), **monologue.oracle(problem)}
