"""What graph, recorder and store cost for each turn, beside bare LangGraph and a bare Python loop over the same scripted
engine.

    python bench/overhead.py [--repeats 9] [--episodes 12] [--json bench/results/overhead.json]

All arms hold the same dialogue (k look-ups with their replies, then a conclusion: 2k + 1 turns) with the same codec and
engine:

    loop       two streams of ids grown in a Python loop; nothing is recorded
    langgraph  the same in a two-node LangGraph graph with a dict of plain values as state; nothing is recorded
    play       ``monologue.graphs.play``: our nodes, spans, pictures, scores, every line flushed to the run folder

Arms take turns within a repeat, so that a busy machine troubles all of them alike. Figures are milliseconds per turn: median,
least and most over the repeats, as wall time and as CPU time of this process. ``overhead`` is play minus loop, of medians.
Concurrency is one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph
from PIL import Image
from rich.console import Console
from rich.table import Table

from monologue.agents import answerer, questioner
from monologue.agents.codec import TinyCodec
from monologue.agents.messages import Look, Message, Reply
from monologue.agents.policy import Policy, Stream
from monologue.backends.base import Picture
from monologue.backends.scripted import Request, ScriptedBackend
from monologue.backends.tokens import SPECIALS
from monologue.graphs.play import aplay
from monologue.tasks.base import Problem

LOOKS = (2, 4, 8, 16, 32)
WORDS = ["where", "is", "the", "red", "star", "?", "b2", "what", "colour", "blue", "green"]
QUESTION, REPLY, ANSWER = "where is the red star ?", "b2", "red"
PICTURE = Image.new("RGB", (84, 84), "red")
TARGET_MS = 2.0


class WordTokenizer:
    """One id per word, so that the tokenizer costs as little as can be."""

    def __init__(self) -> None:
        self.table = {word: index for index, word in enumerate((*SPECIALS, *WORDS))}
        self.words = list(self.table)

    def encode(self, text: str, /, **options: Any) -> list[int]:
        return [self.table[word] for word in text.split()]

    def decode(self, ids: Sequence[int], /, **options: Any) -> str:
        return " ".join(self.words[number] for number in ids)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.table.get(token)


class Silence:
    """A span that forgets."""

    def record(self, **call: Any) -> None:
        pass


def seats(looks: int) -> dict[str, Policy]:
    """A questioner that looks ``looks`` times and concludes, an answerer that always says the same."""
    tokenizer = WordTokenizer()
    codec = TinyCodec(tokenizer)
    tool = tokenizer.table["<tool>"]

    def ask(request: Request) -> str:
        return f"<look> {QUESTION}" if request.prompt.ids.count(tool) < looks else f"<conclude> {ANSWER}"

    backends = {"questioner": ScriptedBackend(ask, tokenizer), "answerer": ScriptedBackend(lambda request: REPLY, tokenizer)}
    return {role: Policy(backend, codec) for role, backend in backends.items()}


def problem(index: int) -> Problem:
    return Problem(f"bench/{index}", "bench", QUESTION, ("red", "blue"), 0, (lambda: PICTURE,))


class Streams:
    """Both streams of one bare episode."""

    def __init__(self, policies: dict[str, Policy]) -> None:
        self.questioner, self.answerer = (Stream(policies[role], role, 0) for role in ("questioner", "answerer"))
        self.wording = policies["questioner"].codec.wording

    async def ask(self, heard: str | None) -> Any:
        opening = questioner.opening(self.wording, QUESTION, ("red", "blue"))
        messages = opening if heard is None else [Message("tool", heard)]
        return await self.questioner.act(Silence(), messages, questioner.KINDS, (questioner.LOOK, questioner.CONCLUDE))

    async def answer(self, question: str) -> str:
        opening = answerer.opening(self.wording, question, [Picture("0" * 64, PICTURE)])
        said = await self.answerer.act(Silence(), answerer.asked(question) if self.answerer.calls else opening, answerer.KINDS)
        assert isinstance(said, Reply)
        return said.text


async def by_loop(policies: dict[str, Policy], episodes: int) -> None:
    for _ in range(episodes):
        streams, heard = Streams(policies), None
        while isinstance(action := await streams.ask(heard), Look):
            heard = await streams.answer(action.question)


class Bare(TypedDict, total=False):
    """State of the bare graph."""

    streams: Streams
    heard: str | None
    question: str | None


async def _ask(state: Bare) -> Bare:
    action = await state["streams"].ask(state.get("heard"))
    return {"question": action.question if isinstance(action, Look) else None}


async def _answer(state: Bare) -> Bare:
    return {"heard": await state["streams"].answer(state["question"] or "")}


def bare_graph() -> Any:
    graph = StateGraph(Bare)
    graph.add_node("ask", _ask)
    graph.add_node("answer", _answer)
    graph.add_edge(START, "ask")
    graph.add_conditional_edges("ask", lambda state: "answer" if state["question"] else END, ["answer", END])
    graph.add_edge("answer", "ask")
    return graph.compile()


async def by_langgraph(policies: dict[str, Policy], episodes: int, graph: Any = bare_graph()) -> None:  # noqa: B008
    for _ in range(episodes):
        await graph.ainvoke({"streams": Streams(policies)}, config={"recursion_limit": 1000})


async def by_play(policies: dict[str, Policy], episodes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        problems = [problem(index) for index in range(episodes)]
        summary = await aplay("monologue", problems, policies, Path(folder) / "run", concurrency=1, max_turns=100, progress=False)
        assert summary.score().accuracy == 1, summary.failed[:1]


ARMS: dict[str, Callable[[dict[str, Policy], int], Awaitable[None]]] = {
    "loop": by_loop,
    "langgraph": by_langgraph,
    "play": by_play,
}


def measure(arm: str, looks: int, episodes: int) -> tuple[float, float]:
    """Wall and CPU milliseconds per turn."""
    policies = seats(looks)
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(ARMS[arm](policies, episodes))
    turns = episodes * (2 * looks + 1)
    return (time.perf_counter() - wall) / turns * 1e3, (time.process_time() - cpu) / turns * 1e3


def rows(repeats: int, episodes: int) -> list[dict[str, Any]]:
    found = []
    for looks in LOOKS:
        count = max(2, episodes * LOOKS[0] // looks)
        figures: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        for repeat in range(repeats + 1):
            for arm in ARMS:
                figure = measure(arm, looks, count)
                if repeat:  # the first round warms up imports and caches
                    figures[arm].append(figure)
        found += [_row(arm, 2 * looks + 1, figures[arm]) for arm in ARMS]
    return found


def _row(arm: str, turns: int, figures: list[tuple[float, float]]) -> dict[str, Any]:
    wall, cpu = (sorted(column) for column in zip(*figures, strict=True))
    return {
        "arm": arm,
        "turns": turns,
        "ms_per_turn": round(statistics.median(wall), 4),
        "least": round(wall[0], 4),
        "most": round(wall[-1], 4),
        "cpu_ms_per_turn": round(statistics.median(cpu), 4),
        "repeats": len(figures),
    }


def report(found: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """The rows with what follows from them."""
    median = {(row["arm"], row["turns"]): row["ms_per_turn"] for row in found}
    lengths = sorted({row["turns"] for row in found})
    over = {str(turns): round(median["play", turns] - median["loop", turns], 4) for turns in lengths}
    return {
        "name": "overhead",
        "command": command,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "rows": found,
        "ratio": round(statistics.median(median["play", turns] / median["langgraph", turns] for turns in lengths), 3),
        "ratio_of": "play over langgraph, median over the lengths",
        "overhead_ms_per_turn": over,
        "longest_over_shortest": round(median["play", lengths[-1]] / median["play", lengths[0]], 3),
        "target_ms_per_turn": TARGET_MS,
        "met": all(value < TARGET_MS for value in over.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each arm and length")
    parser.add_argument("--episodes", type=int, default=12, help="episodes at the shortest length; longer ones get fewer")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "overhead.json", help="where to write")
    options = parser.parse_args()
    command = f"python bench/overhead.py --repeats {options.repeats} --episodes {options.episodes}"
    result = report(rows(options.repeats, options.episodes), command)
    table = Table("arm", "turns", "ms/turn", "least", "most", "CPU ms/turn", title="overhead")
    for row in result["rows"]:
        table.add_row(*(str(row[name]) for name in ("arm", "turns", "ms_per_turn", "least", "most", "cpu_ms_per_turn")))
    Console().print(table, f"play minus loop, ms per turn by length: {result['overhead_ms_per_turn']}", sep="\n")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
