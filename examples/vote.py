"""Parallel branches: one answerer looks three times with dice, the majority answers, and what it said when it was right is imitated.

python examples/vote.py [FOLDER]
"""

import operator
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from monologue import Context, Graph, Looks, Message, Reply, Sampling, State, imitate, load_policy, play, solved, starter, verify


class Votes(State, total=False):
    branch: int
    votes: Annotated[list[str], operator.add]


async def look(state: Votes, runtime: Any) -> dict[str, Any]:
    with runtime.context.turn("answerer", "look", stream=f"answerer/{state['branch']}") as turn:
        said = await turn.act([Message("user", state["question"], runtime.context.pictures)], (Reply,))
    return {"votes": [said.text]}


async def count(state: Votes, runtime: Any) -> dict[str, Any]:
    return {"answer": Counter(state["votes"]).most_common(1)[0][0]}


def build() -> Any:
    graph = StateGraph(Votes, context_schema=Context)
    graph.add_node("look", look)
    graph.add_node("count", count)
    graph.add_conditional_edges(START, lambda state: [Send("look", {**state, "branch": k}) for k in range(3)], ["look"])
    graph.add_edge("look", "count")
    graph.add_edge("count", END)
    return graph.compile()


def main(folder: Path) -> None:
    seats = {"answerer": load_policy(starter("answerer"), "answerer", sampling=Sampling(temperature=1.5))}
    summary = play(Graph("vote", ("answerer",), build), Looks().problems("train", 24), seats, folder / "run")
    print(f"accuracy {summary.score().accuracy:.2f}, trace verified: {all(check.ok for check in verify(folder / 'run'))}")
    report = imitate(folder / "run", starter("answerer"), folder / "trained", role="answerer", steps=4, lr=1e-4, keep=solved)
    print(f"imitated {report['rows']} right answers into {folder / 'trained'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/vote"))
