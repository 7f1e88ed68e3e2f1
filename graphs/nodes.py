"""Nodes from which graphs are made: a policy acts, the answerer is asked, a tool is called.

``policy_node`` is the whole art: what the role hears, what follows from its action. It opens the span, grows the role's
stream, records the edge taken, and refuses an update with a key that the state does not have (LangGraph would drop it in
silence). A builder's own node is written the same way, or freely with ``context.turn(role, node)``; both are traced and
trainable with no further code.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeAlias

from langgraph.graph import END
from langgraph.runtime import Runtime
from langgraph.types import Command

from monologue.agents import answerer, questioner
from monologue.agents.codec import Force, Schema
from monologue.agents.messages import Action, Conclude, Look, Message, ParseFault, Reply, ToolUse, plain
from monologue.agents.tools import enlarge
from monologue.graphs.state import Context, GraphError, State

Update: TypeAlias = "dict[str, Any]"


class Node(Protocol):
    """A node as LangGraph calls it."""

    def __call__(self, state: State, *, runtime: Runtime[Context]) -> Awaitable[Command[str]]: ...


class Step(NamedTuple):
    """What follows from an action."""

    update: Update
    """Changes to the state."""
    goto: str
    """The next node."""
    edge: str
    """Name of the edge taken, for the trace: look, tool, conclude, reply, correct, out_of_turns."""


def checked(node: Node, keys: frozenset[str] = frozenset(State.__annotations__)) -> Node:
    """The node, refusing updates of keys that the state does not have."""

    @wraps(node)
    async def run(state: State, runtime: Runtime[Context]) -> Command[str]:
        command = await node(state, runtime=runtime)
        unknown = set(command.update or {}) - keys
        if unknown:
            raise GraphError(f"a node wrote {sorted(unknown)}, which the state does not have; its keys are {sorted(keys)}")
        return command

    return run


def policy_node(
    name: str,
    role: str,
    hear: Callable[[State, Context], list[Message]],
    then: Callable[[State, Action | ParseFault, Context], Step],
    kinds: tuple[type, ...],
    tools: Callable[[Context], tuple[Schema, ...]] = lambda context: (),
    force: Callable[[State], Force | None] = lambda state: None,
    keys: frozenset[str] = frozenset(State.__annotations__),
    stream: Callable[[State], str | None] = lambda state: None,
) -> Node:
    """A node in which ``role`` hears something, acts, and something follows. ``keys`` are those of a builder's own state; ``stream``
    names the sequence of ids that grows, where that is not the role's only one (branches by ``Send``, subgraphs).
    """

    async def run(state: State, runtime: Runtime[Context]) -> Command[str]:
        context = runtime.context
        with context.turn(role, name, stream(state)) as turn:
            action = await turn.act(hear(state, context), kinds, tools(context), force(state))
            step = then(state, action, context)
            turn.span.edge = step.edge
        return Command(update=step.update, goto=step.goto)

    return checked(run, keys)


def entry(role: str, action: Action | ParseFault) -> Mapping[str, Any]:
    """An action as a line of the dialogue."""
    if isinstance(action, ParseFault):
        return {"role": role, "kind": "fault", "reason": action.reason, "text": action.text}
    return {"role": role, **plain(action)}


def after_question(state: State, action: Action | ParseFault, context: Context) -> Step:
    """What follows when the concluding seat has acted: the end, a look, a tool, a correction, or the end of its budget."""
    asked = state.get("asked", 0) + 1
    update: Update = {"asked": asked, "dialogue": [entry("questioner", action)]}
    if isinstance(action, Conclude):
        return Step({**update, "answer": action.answer, "explanation": action.explanation}, END, "conclude")
    if asked >= context.max_turns:
        return Step(update, END, "out_of_turns")
    if isinstance(action, ParseFault):
        return Step({**update, "heard": {"kind": "fault", "reason": action.reason, "text": action.text}}, "ask", "correct")
    goto, edge = ("answer", "look") if isinstance(action, Look) else ("tools", "tool")
    return Step({**update, "pending": plain(action)}, goto, edge)


def hear_question(state: State, context: Context) -> list[Message]:
    """What the questioner hears: the problem at first, then what came of its last action."""
    wording = context.wording("questioner")
    heard = state.get("heard") or {}
    if not context.opened("questioner"):
        caption = heard["text"] if heard.get("kind") == "caption" else None
        return questioner.opening(wording, state["question"], state.get("choices", ()), caption)
    if heard["kind"] == "reply":
        return questioner.reply_heard(heard["text"])
    fault = ParseFault(heard["reason"], heard["text"])
    return questioner.unanswered(wording, fault) if heard["kind"] == "unanswered" else questioner.corrected(wording, fault)


def after_answer(state: State, action: Action | ParseFault, context: Context) -> Step:
    """The reply, or that there was none, goes back to the questioner."""
    update: Update = {"looks": state.get("looks", 0) + 1, "dialogue": [entry("answerer", action)]}
    if isinstance(action, Reply):
        return Step({**update, "heard": {"kind": "reply", "text": action.text}}, "ask", "reply")
    assert isinstance(action, ParseFault)
    return Step({**update, "heard": {"kind": "unanswered", "reason": action.reason, "text": action.text}}, "ask", "correct")


def hear_answer(state: State, context: Context) -> list[Message]:
    """What the answerer hears: the pictures once, each question in turn, enlarged regions where the questioner wants them."""
    pending = state["pending"]
    question = context.asks(state.get("looks", 0), pending["question"])
    region = pending.get("region")
    enlarged = [context.record.store(enlarge(picture.image, region)) for picture in context.pictures] if region else []
    if context.opened("answerer"):
        return answerer.asked(question, enlarged)
    return answerer.opening(context.wording("answerer"), question, [*context.pictures, *enlarged])


def ask(force: Callable[[State], Force | None] = lambda state: None) -> Node:
    """The questioner's node."""
    kinds, tools = questioner.KINDS, lambda context: (questioner.LOOK, questioner.CONCLUDE, *context.toolbox.schemas)
    return policy_node("ask", "questioner", hear_question, after_question, kinds, tools, force)


def conclude() -> Node:
    """The questioner's node where it can only conclude."""
    return policy_node(
        "ask",
        "questioner",
        hear_question,
        after_question,
        (Conclude,),
        lambda context: (questioner.CONCLUDE,),
        lambda state: "conclude",
    )


def answer() -> Node:
    """The answerer's node."""
    return policy_node("answer", "answerer", hear_answer, after_answer, answerer.KINDS)


async def _use_tool(state: State, runtime: Runtime[Context]) -> Command[str]:
    pending = state["pending"]
    with runtime.context.record.tool(
        name=pending["name"], arguments=pending["arguments"], node="tools", parent=runtime.context.parent
    ) as span:
        span.result = await runtime.context.toolbox.call(ToolUse(pending["name"], pending["arguments"]))
    said = {"role": "tool", "kind": "reply", "text": span.result}
    return Command(update={"heard": {"kind": "reply", "text": span.result}, "dialogue": [said]}, goto="ask")


def tools() -> Node:
    """The node that calls the builder's tools."""
    return checked(_use_tool)
