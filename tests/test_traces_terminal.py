"""What is shown in the terminal: every turn of every kind, and nothing that model text could do to it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from monologue.backends.base import Thought
from monologue.traces import names
from monologue.traces.recorder import Recorder
from monologue.traces.schema import Annotation, EpisodeEnd, EpisodeStart
from monologue.traces.store import RunReader, RunWriter
from monologue.traces.terminal import half_blocks, head, replay, turn, verdict
from tests import page_runs

HOSTILE = ["\x1b[2J\x1b[31mgone", "ring\x07", "over\rwritten", "[red]markup[/red]", "\u202eevil", "[link=file:///etc/passwd]x[/link]"]


def shown(write: Any, *parts: Any) -> str:
    page = io.StringIO()
    write(*parts, Console(file=page, force_terminal=False, width=200, highlight=False))
    return page.getvalue()


def start(question: str = "what is it ?", choices: tuple[str, ...] = ("red", "blue"), gold: int | None = 0) -> EpisodeStart:
    identity = {"run_id": "r", "episode_id": "e" * 32, "root_span_id": "0" * 16, "problem_id": "p", "group_id": "p"}
    facts = {"task": "t", "graph": "monologue", "sample_index": 0, "attempt": 0, "started_ns": 0, "family": "own", "extra": {}}
    return EpisodeStart.model_validate({**identity, **facts, "question": question, "choices": choices, "gold": gold})


def end(status: str = "ok", answer: str | None = None, error: str | None = None) -> EpisodeEnd:
    counts = {"episode_id": "e" * 32, "ended_ns": 1, "calls": 1, "spans": 1, "turns": 1}
    return EpisodeEnd.model_validate({**counts, "status": status, "answer": answer, "error": error})


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text_wherever_it_stands(text: str) -> None:
    call = {names.ROLE: "answerer", names.ACTION: json.dumps({"kind": "reply", "text": text})}
    tool = {names.TOOL_NAME: text, names.TOOL_ARGUMENTS: text, names.TOOL_RESULT: text}
    failed = {names.ROLE: text, names.ERROR: text}
    unparsed = {names.ROLE: "questioner", names.OUTPUT: text, names.PARSE_ERROR: text}
    pages = [
        shown(turn, attributes, kind) for attributes, kind in ((call, "policy"), (tool, "tool"), (failed, "policy"), (unparsed, "policy"))
    ]
    pages.append(shown(head, start(question=text, choices=(text, "other"))))
    pages.append(shown(verdict, start(), end("failed", error=text), []))
    visible = "".join(c if c.isprintable() else "\ufffd" for c in text)
    for page in pages:
        assert visible in page
        assert not any(c in page for c in "\x1b\x07\r\u202e")


def test_the_picture_keeps_its_colours_and_its_shape() -> None:
    image = Image.new("RGB", (80, 40), "red")
    image.paste((0, 0, 255), (0, 20, 80, 40))
    text = half_blocks(image, 40)
    lines = text.plain.splitlines()
    assert len(lines) == 10 and all(len(line) == 40 for line in lines)
    styles = {str(span.style) for span in text.spans}
    assert styles == {"rgb(255,0,0) on rgb(255,0,0)", "rgb(0,0,255) on rgb(0,0,255)"}


@pytest.mark.parametrize(("answer", "word"), [("RED ", "right"), ("blue", "wrong"), (None, "wrong")])
def test_the_verdict_compares_answer_and_gold(answer: str | None, word: str) -> None:
    assert word in shown(verdict, start(), end(answer=answer), [])


def test_an_episode_without_an_end_and_a_reward_of_zero_are_told_apart_from_nothing() -> None:
    assert "never ended" in shown(verdict, start(), None, [])
    facts = {"episode_id": "e" * 32, "span_id": None, "text": None, "weight": 1.0, "role": None, "created_ns": 1}
    note = Annotation.model_validate({**facts, "name": "exact_match", "value": 0.0, "scope": "episode", "source": "task:t"})
    assert "exact_match = 0.0" in shown(verdict, start(), end(answer="red"), [note])


def test_latent_steps_are_told_line_by_line_before_the_reply(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    with page_runs.begun(Recorder(writer)) as episode:
        with episode.policy(role="thinker", node="think") as call:
            thought = Thought((2, 7), 1.0, ("red", "[bold]"), (0.75, 0.25))
            call.record(**page_runs.facts("red", action='{"kind": "reply", "text": "red"}', thoughts=(thought, Thought((), 1.0, (), ()))))
        episode.finish("red")
    writer.close()
    (shown,) = RunReader(tmp_path / "run").episodes()
    console = Console(file=io.StringIO(), width=100)
    replay(RunReader(tmp_path / "run"), shown, console)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    first = lines.index("thought  near red 0.75, [bold] 0.25; reads 3, 8 again")
    assert lines[first + 1] == "thought  near words that were not recorded" and lines[first + 2].startswith("thinker  red")
