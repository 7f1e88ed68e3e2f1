"""A tool between turns: code plans, the answerer counts twice in one stream, a LangChain tool adds. Its right counts are imitated."""

import re
import sys
from pathlib import Path
from typing import Any

from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph

from monologue import Context, Graph, Message, Reply, Sampling, Shapes, State, imitate, load_policy, play, solved, starter, verify


@tool
def add(first: int, second: int) -> int:
    """The sum of two numbers."""
    return first + second


class Counts(State, total=False):
    counts: list[int]


async def count(state: Counts, runtime: Any) -> dict[str, Any]:
    counts: list[int] = []
    for things in re.findall(r"(?:many|plus) (\w+(?: objects)?)", state["question"]):
        question = Message("user", f"how many {things} are there ?", () if counts else runtime.context.pictures)
        with runtime.context.turn("counter", "count") as turn:
            said = await turn.act([question], (Reply,))
        counts.append(int(said.text))
    return {"counts": counts}


async def total(state: Counts, runtime: Any) -> dict[str, Any]:
    numbers = dict(zip(("first", "second"), state["counts"], strict=True))
    with runtime.context.record.tool(name=add.name, arguments=numbers, node="total") as span:
        span.result = str(await add.ainvoke(numbers))
    return {"answer": span.result}


def build() -> Any:
    graph = StateGraph(Counts, context_schema=Context)
    graph.add_sequence([("count", count), ("total", total)])
    graph.add_edge(START, "count")
    graph.add_edge("total", END)
    return graph.compile()


def main(folder: Path) -> None:
    seats = {"counter": load_policy(starter("answerer"), "answerer", sampling=Sampling(temperature=1.0))}
    summary = play(Graph("sum", ("counter",), build), Shapes(["total"]).problems("train", 24), seats, folder / "run")
    print(f"accuracy {summary.score().accuracy:.2f}, trace verified: {all(check.ok for check in verify(folder / 'run'))}")
    report = imitate(folder / "run", starter("answerer"), folder / "trained", role="counter", steps=4, lr=1e-4, keep=solved)
    print(f"imitated {report['sampled']} ids of {report['rows']} right episodes into {folder / 'trained'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sum"))
