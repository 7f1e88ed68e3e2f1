"""Graphs as LangGraph graphs: drawn, streamed, checked, extended by a builder's own node, served by ``langgraph.json``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command

from monologue.agents.codec import TinyCodec
from monologue.agents.messages import Message, Reply
from monologue.agents.policy import Policy
from monologue.backends.scripted import ScriptedBackend
from monologue.backends.tokens import ByteTokenizer
from monologue.graphs import studio
from monologue.graphs.nodes import Step, checked, policy_node
from monologue.graphs.play import play
from monologue.graphs.registry import Graph, find, names, register
from monologue.graphs.state import Context, GraphError, State
from monologue.tasks.shapes import Shapes
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunReader, RunWriter

CODEC = TinyCodec(ByteTokenizer())
ROOT = Path(__file__).parent.parent


def scripted(replies: Any) -> Policy:
    return Policy(ScriptedBackend(replies), CODEC)


def test_every_ready_graph_can_be_drawn() -> None:
    for name in names():
        drawing = find(name).compiled().get_graph().draw_mermaid()
        assert "__start__" in drawing and "__end__" in drawing
    drawing = find("monologue").compiled().get_graph().draw_mermaid()
    for edge in ("ask -.-> answer", "answer -.-> ask", "ask -.-> tools", "tools -.-> ask", "ask -.-> __end__"):
        assert edge in drawing


async def test_a_graph_streams_its_updates_node_by_node(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    said = iter(["<look>where?", "<conclude>red"])
    with Recorder(writer).episode(problem_id="p", task="t", graph="monologue", group_id="p", question="what?", choices=("red",)) as ep:
        seats = {"questioner": scripted(lambda request: next(said)), "answerer": scripted(["b2"])}
        context = Context(seats, ep)
        stream = find("monologue").compiled().astream({"question": "what?", "choices": ["red"]}, context=context, stream_mode="updates")
        updates = [update async for update in stream]
        ep.finish(answer="red")
    assert [next(iter(update)) for update in updates] == ["ask", "answer", "ask"]
    assert updates[-1]["ask"]["answer"] == "red"
    assert json.loads(json.dumps(updates)) == updates, "the state holds plain values only"


async def test_an_update_of_a_key_that_the_state_lacks_is_refused() -> None:
    async def typo(state: State, runtime: Any) -> Command[str]:
        return Command(update={"anwser": "red"}, goto=END)

    with pytest.raises(GraphError, match="anwser"):
        await checked(typo)({}, runtime=None)  # type: ignore[arg-type]


def test_a_builders_own_graph_is_traced_and_trainable_with_no_further_code(tmp_path: Path) -> None:
    def hear(state: State, context: Context) -> list[Message]:
        return [Message("user", state["question"])]

    def then(state: State, action: Any, context: Context) -> Step:
        return Step({"answer": action.text}, END, "said")

    def build() -> Any:
        graph = StateGraph(State, context_schema=Context)
        graph.add_node("poet", policy_node("poet", "poet", hear, then, (Reply,)), destinations=(END,))
        graph.add_edge(START, "poet")
        return graph.compile()

    seats = {"poet": scripted(lambda request: "a rose")}
    summary = play(Graph("poem", ("poet",), build), Shapes().problems("train", 3), seats, tmp_path / "run")
    assert [episode.answer for episode in summary.episodes] == ["a rose"] * 3
    for episode in RunReader(tmp_path / "run").episodes():
        (call,) = episode.calls()
        assert call.role == call.node == "poet" and call.edge == "said" and call.trainable
        assert CODEC.text(call.sampled_ids) == "a rose<eos>"


def test_a_graphs_name_is_taken_once() -> None:
    with pytest.raises(GraphError, match="unique"):
        register(find("blind"))
    with pytest.raises(GraphError, match="looks"):
        find("monologue:looks=-1")
    with pytest.raises(GraphError, match="key=number"):
        find("monologue:turns=2")


async def test_langgraph_json_names_a_factory_without_arguments() -> None:
    path, _, name = json.loads((ROOT / "langgraph.json").read_text())["graphs"]["monologue"].partition(":")
    spec = importlib.util.spec_from_file_location("served", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "monologue" in getattr(module, name)().get_graph().draw_mermaid()


async def test_the_served_graph_plays_an_episode_on_a_picture_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(Shapes().problems("train", 1)).pictures[0]().save(tmp_path / "board.png")
    monkeypatch.setenv("MONOLOGUE_PICTURES", str(tmp_path))
    monkeypatch.setenv("MONOLOGUE_RUNS", str(tmp_path / "runs"))
    said = iter(["<look>where?", "<conclude>red"])
    graph = studio.build({"questioner": scripted(lambda request: next(said)), "answerer": scripted(["b2"])})
    told = await graph.ainvoke({"question": "what?", "choices": ["red", "blue"], "image": "board.png"})
    assert told["answer"] == "red" and len(list(RunReader(Path(told["run"])).episodes())) == 1
    with pytest.raises(GraphError, match="pictures come from"):
        await graph.ainvoke({"question": "what?", "choices": ["red", "blue"], "image": "../../etc/passwd"})
    with pytest.raises(GraphError, match="no choices and no image"):
        await graph.ainvoke({"question": "what?"})
