"""A router and a subgraph: guess at once; where the guess is unsure, hold a whole monologue instead. A node that fails is tried again.

python examples/fallback.py [FOLDER]
"""

import math
import sys
from pathlib import Path
from typing import Any

from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy

from monologue import Context, Graph, Message, Reply, Sampling, Shapes, State, find, imitate, load_policy, play, solved, starter, verify


async def guess(state: State, runtime: Any) -> Command[str]:
    with runtime.context.turn("guesser", "guess") as turn:
        question = Message("user", state["question"], runtime.context.pictures, tuple(state["choices"]))
        said = await turn.act([question], (Reply,))
        sure = math.exp(sum(turn.logprobs or ())) > 0.9
        turn.span.edge = "sure" if sure else "unsure"
    return Command(update={"answer": said.text} if sure else {}, goto=END if sure else "reason")


async def reason(state: State, runtime: Any) -> dict[str, Any]:
    with runtime.context.step("monologue") as inner:
        found = await find("monologue").compiled().ainvoke({"question": state["question"], "choices": state["choices"]}, context=inner)
    return {"answer": found.get("answer"), "dialogue": found["dialogue"]}


def build() -> Any:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("guess", guess, destinations=("reason", END), retry_policy=RetryPolicy(max_attempts=2))
    graph.add_node("reason", reason)
    graph.add_edge(START, "guess")
    graph.add_edge("reason", END)
    return graph.compile()


def main(folder: Path) -> None:
    greedy = Sampling(temperature=0)
    seats = {role: load_policy(starter(role), role, sampling=greedy) for role in ("questioner", "answerer")}
    seats["guesser"] = load_policy(starter("direct"), "answerer", sampling=Sampling(), policy_id="guesser")
    summary = play(Graph("fallback", tuple(seats), build), Shapes().problems("train", 24), seats, folder / "run")
    print(f"accuracy {summary.score().accuracy:.2f}, trace verified: {all(check.ok for check in verify(folder / 'run'))}")
    report = imitate(folder / "run", starter("direct"), folder / "trained", role="guesser", steps=4, lr=1e-4, keep=solved)
    print(f"imitated {report['rows']} guesses into {folder / 'trained'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fallback"))
