"""A builder's own graphs: other roles, parallel branches, subgraphs, retries, an exception in the middle. Parents, order, rows."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import RetryPolicy, Send

from monologue.agents.codec import TinyCodec
from monologue.agents.messages import Message, Reply
from monologue.agents.policy import Policy
from monologue.backends.base import Sampling
from monologue.backends.scripted import ScriptedBackend
from monologue.backends.tokens import ByteTokenizer
from monologue.graphs.play import play
from monologue.graphs.registry import Graph
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.shapes import Shapes
from monologue.traces.store import Episode, RunReader
from monologue.traces.verify import verify
from monologue.training.rows import Counts, read_rows

CODEC = TinyCodec(ByteTokenizer())


class Panel(State, total=False):
    """A panel's state."""

    branch: int
    votes: Annotated[list[str], operator.add]


def speaker(reply: str) -> Policy:
    return Policy(ScriptedBackend(lambda request: reply, ByteTokenizer()), CODEC, Sampling(max_tokens=100))


async def expert(state: Panel, runtime: Any) -> dict[str, Any]:
    """Two turns in a stream of its own."""
    with runtime.context.step("panel", branch=state["branch"]) as context:
        for question in ("what is it ?", "are you sure ?"):
            with context.turn("expert", "expert", stream=f"expert/{state['branch']}") as turn:
                said = await turn.act([Message("user", question)], (Reply,))
    return {"votes": [said.text]}


async def judge(state: Panel, runtime: Any) -> dict[str, Any]:
    with runtime.context.turn("judge", "judge") as turn:
        said = await turn.act([Message("user", " ".join(state["votes"]))], (Reply,))
    return {"answer": said.text}


def panel(**options: Any) -> Graph:
    graph = StateGraph(Panel, context_schema=Context)
    graph.add_node("expert", expert, **options)
    graph.add_node("judge", judge)
    graph.add_conditional_edges(START, lambda state: [Send("expert", {"branch": index}) for index in range(3)], ["expert"])
    graph.add_edge("expert", "judge")
    graph.add_edge("judge", END)
    return Graph("panel", ("expert", "judge"), lambda: graph.compile())


def played(graph: Graph, run: Path, seats: dict[str, Policy]) -> Episode:
    play(graph, Shapes().problems("test", 1), seats, run, progress=False)
    (episode,) = RunReader(run).episodes()
    return episode


def test_branches_have_streams_of_their_own_and_join(tmp_path: Path) -> None:
    episode = played(panel(), tmp_path / "run", {"expert": speaker("red"), "judge": speaker("red")})
    assert episode.complete and episode.end is not None and episode.end.answer == "red"
    assert all(check.ok for check in verify(tmp_path / "run"))
    counts = Counts()
    rows = {row.stream: row for row in read_rows(tmp_path / "run", counts=counts)}
    assert sorted(rows) == ["expert/0", "expert/1", "expert/2", "judge"] and not counts.breaks
    assert [len(rows[name].pieces) for name in sorted(rows)] == [2, 2, 2, 1]
    assert {row.role for row in rows.values()} == {"expert", "judge"}


def test_steps_within_a_step_have_it_as_their_parent(tmp_path: Path) -> None:
    episode = played(panel(), tmp_path / "run", {"expert": speaker("red"), "judge": speaker("red")})
    steps = {span.span_id: span for span in episode.spans if span.kind == "node"}
    assert len(steps) == 3 and {span.attributes["branch"] for span in steps.values()} == {0, 1, 2}
    for span in episode.spans:
        if span.kind == "policy" and span.name == "chat expert":
            above = steps[span.parent_id]
            assert above.seq < span.seq and above.start_ns <= span.start_ns <= span.end_ns <= above.end_ns
        else:
            assert span.parent_id == episode.start.root_span_id
    assert [span.seq for span in episode.spans] == list(range(len(episode.spans)))


def test_two_calls_of_one_stream_at_once_are_refused_with_advice(tmp_path: Path) -> None:
    async def crowded(state: Panel, runtime: Any) -> dict[str, Any]:
        with runtime.context.turn("expert", "expert") as turn:
            said = await turn.act([Message("user", "what is it ?")], (Reply,))
        return {"votes": [said.text]}

    graph = StateGraph(Panel, context_schema=Context)
    graph.add_node("expert", crowded)
    graph.add_conditional_edges(START, lambda state: [Send("expert", {}) for _ in range(2)], ["expert"])
    graph.add_edge("expert", END)
    slow = Policy(ScriptedBackend(lambda request: "red", ByteTokenizer(), delay=0.05), CODEC)
    episode = played(Graph("crowd", ("expert",), lambda: graph.compile()), tmp_path / "run", {"expert": slow})
    assert episode.end is not None and episode.end.status == "failed" and "streams of their own" in (episode.end.error or "")
    with pytest.raises(GraphError, match="no policy is seated"), Context({}, None).turn("nobody", "n"):  # type: ignore[arg-type]
        pass


def test_a_node_that_is_tried_again_says_its_piece_once_more_and_the_failed_try_stays_on_record(tmp_path: Path) -> None:
    tries: list[int] = []

    async def shaky(state: State, runtime: Any) -> dict[str, Any]:
        with runtime.context.turn("expert", "first") as turn:
            await turn.act([Message("user", "what is it ?")], (Reply,))
        return {}

    async def breaks_once(state: State, runtime: Any) -> dict[str, Any]:
        with runtime.context.turn("expert", "second") as turn:
            said = await turn.act([Message("user", "are you sure ?")], (Reply,))
            tries.append(1)
            if len(tries) == 1:
                raise ConnectionError("the line broke")
        return {"answer": said.text}

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("first", shaky)
    graph.add_node("second", breaks_once, retry_policy=RetryPolicy(initial_interval=0.01))
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    graph.add_edge("second", END)
    episode = played(Graph("shaky", ("expert",), lambda: graph.compile()), tmp_path / "run", {"expert": speaker("red")})
    assert episode.complete and [span.status for span in episode.spans] == ["ok", "error", "ok"]
    first, failed, again = episode.calls()
    assert failed.prompt_ids == again.prompt_ids and again.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    assert again.prefix_break is not None
    counts = Counts()
    rows = list(read_rows(tmp_path / "run", counts=counts))
    (row,) = rows
    assert [piece.span_id for piece in row.pieces] == [first.span_id, again.span_id] and not counts.breaks
    assert failed.failed and counts.skipped == {"call that an exception left": 1}


def test_an_exception_in_the_middle_fails_the_episode_and_keeps_what_was_said(tmp_path: Path) -> None:
    async def breaks(state: Panel, runtime: Any) -> dict[str, Any]:
        with runtime.context.turn("judge", "judge") as turn:
            await turn.act([Message("user", "so ?")], (Reply,))
            raise KeyError("our own bug")

    graph = StateGraph(Panel, context_schema=Context)
    graph.add_node("expert", expert)
    graph.add_node("judge", breaks)
    graph.add_conditional_edges(START, lambda state: [Send("expert", {"branch": 0})], ["expert"])
    graph.add_edge("expert", "judge")
    graph.add_edge("judge", END)
    own = Graph("breaks", ("expert", "judge"), lambda: graph.compile())
    episode = played(own, tmp_path / "run", {"expert": speaker("red"), "judge": speaker("red")})
    assert episode.end is not None and episode.end.status == "failed" and "our own bug" in (episode.end.error or "")
    assert len(episode.calls()) == 3 and episode.spans[-1].status == "error"
    assert list(read_rows(tmp_path / "run")) == []


def test_a_subgraph_plays_under_its_step(tmp_path: Path) -> None:
    inner = StateGraph(State, context_schema=Context)

    async def ask(state: State, runtime: Any) -> dict[str, Any]:
        with runtime.context.turn("expert", "ask") as turn:
            said = await turn.act([Message("user", "what is it ?")], (Reply,))
        return {"answer": said.text}

    inner.add_node("ask", ask)
    inner.add_edge(START, "ask")
    inner.add_edge("ask", END)
    compiled = inner.compile()

    async def outer_node(state: State, runtime: Any) -> dict[str, Any]:
        with runtime.context.step("inner") as context:
            found = await compiled.ainvoke({"question": state["question"]}, context=context)
        return {"answer": found["answer"]}

    outer = StateGraph(State, context_schema=Context)
    outer.add_node("run", outer_node)
    outer.add_edge(START, "run")
    outer.add_edge("run", END)
    episode = played(Graph("nested", ("expert",), lambda: outer.compile()), tmp_path / "run", {"expert": speaker("red")})
    step, said = episode.spans
    assert (step.kind, said.kind, said.parent_id) == ("node", "policy", step.span_id) and episode.complete
