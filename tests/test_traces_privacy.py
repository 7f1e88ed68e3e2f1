"""What must not reach the disk does not: shape only, redaction, and the lines that warn of uploads."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from PIL import Image

from monologue.cli import main
from monologue.commands import warn_of_uploads
from monologue.traces import names
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunReader, RunWriter
from monologue.traces.verify import Check, verify

ROOT = Path(__file__).parent.parent
SECRET = "4711-AMSEL"


def call(prompt: tuple[int, ...], text: str = "", output: str = "x", **more: Any) -> dict[str, Any]:
    """What a policy call records."""
    facts: dict[str, Any] = {"policy_id": "p", "weights_version": "0", "trainable": True, "prompt_ids": prompt, "sampled_ids": (7, 8)}
    facts |= {"sampled_logprobs": (-0.5, -0.5), "loss_mask": b"\1\1", "sampling": {"temperature": 1.0}, "engine": "e", "model": "m"}
    facts |= {"engine_version": "1", "tokenizer_hash": "t", "template_hash": "l", "finish_reason": "stop", "truncated": False}
    message = {"role": "user", "parts": [{"type": "text", "content": text}]}
    facts |= {
        "images": (),
        "cached_tokens": None,
        "messages": [json.dumps(message)],
        "action": json.dumps({"kind": "reply", "text": output}),
    }
    return facts | {"parse_error": None, "output": output} | more


def played(run: Path, question: str = "q", extra: list[SpanProcessor] | None = None, **privacy: Any) -> None:
    """One episode that says the secret in its question, in a reply, in a tool call and in an error, and one that says nothing."""
    recorder = Recorder(RunWriter(run), extra or [], **privacy)
    with recorder.episode(problem_id="p0", task="t", graph="g", group_id="p0", question="harmless", choices=("a", "b"), gold=1) as episode:
        with episode.policy(role="questioner", node="ask") as span:
            span.record(**call((1, 2), "harmless"))
        episode.finish(answer="b")
    facts: dict[str, Any] = {"task": "t", "graph": "g", "extra": {"note": f"of {question}", "temperature": 1.0, "control": "c"}}
    with (
        pytest.raises(RuntimeError),
        recorder.episode(problem_id="p1", group_id="p1", question=question, choices=(question, "b"), gold=0, **facts) as episode,
    ):
        episode.store(Image.new("RGB", (8, 8), "red"))
        for turn, text in enumerate(("harmless", question, "harmless again")):
            with episode.policy(role="questioner", node="ask") as span:
                span.record(**call(tuple(range(turn * 4 + 2)), text))
                span.edge = "look"
        with episode.policy(role="answerer", node="answer") as span:
            span.record(**call((1,), "harmless", output=question, action=json.dumps({"kind": "reply", "text": question})))
        with episode.policy(role="other", node="answer") as span:
            span.record(**call((1,), "harmless", action=None, parse_error=f"no {question}"))
        with episode.tool(name="sum", arguments={question: [question]}, node="tools") as tool:
            tool.result = f"is {question}"
        episode.annotate(name="remark", text=f"about {question}", source="test")
        episode.annotate(name="reward", value=0.0, source="test")
        with episode.policy(role="last", node="answer"):
            raise RuntimeError(f"broken by {question}")


def on_disk(run: Path) -> str:
    return "".join(path.read_text() for path in sorted(run.rglob("*.json*")))


def check(run: Path, name: str) -> Check:
    return next(found for found in verify(run) if found.name == name)


class Ear(SpanProcessor):
    """A further processor: what it hears has left the house."""

    def __init__(self) -> None:
        self.heard = ""

    def on_end(self, span: ReadableSpan) -> None:
        self.heard += span.to_json()


def test_the_shape_of_a_run_holds_no_text_no_ids_and_no_pictures(tmp_path: Path) -> None:
    ear = Ear()
    played(tmp_path / "run", SECRET, [ear], capture="shape")
    played(tmp_path / "open", SECRET)
    written = on_disk(tmp_path / "run")
    assert SECRET in on_disk(tmp_path / "open") and SECRET not in written and SECRET not in ear.heard
    assert "harmless" not in written and not list((tmp_path / "run" / "images").iterdir())
    shape, whole = (list(RunReader(tmp_path / name).episodes()) for name in ("run", "open"))
    for thin, full in zip(shape, whole, strict=True):
        assert [(s.name, s.kind, s.seq, s.status) for s in thin.spans] == [(s.name, s.kind, s.seq, s.status) for s in full.spans]
        assert [s.attributes.get(names.EDGE) for s in thin.spans] == [s.attributes.get(names.EDGE) for s in full.spans]
        for name in (names.INPUT_TOKENS, names.OUTPUT_TOKENS, names.PREFIX_LENGTH, names.ERROR_TYPE):
            assert [s.attributes.get(name) for s in thin.spans] == [s.attributes.get(name) for s in full.spans]
        assert [(n.name, n.value) for n in thin.annotations] == [(n.name, n.value) for n in full.annotations]
        assert thin.calls() == [] and thin.end and full.end and thin.end.turns == full.end.turns
    assert shape[1].start.extra == {"temperature": 1.0, "control": "c", "capture": "shape"}


def test_verify_passes_on_a_shape_and_says_what_is_not_there(tmp_path: Path) -> None:
    played(tmp_path / "run", SECRET, capture="shape")
    checks = {found.name: found for found in verify(tmp_path / "run")}
    assert {name for name, found in checks.items() if not found.ok} == {"episodes"}  # one was played to fail
    assert checks["content"].detail == "not captured, so not checked: 7 shape"


def test_verify_finds_ids_that_were_not_to_be_there_and_ids_that_are_missing(tmp_path: Path) -> None:
    played(tmp_path / "run", SECRET)
    [file] = (tmp_path / "run" / "spans").iterdir()
    whole = file.read_text()
    assert check(tmp_path / "run", "content").ok
    file.write_text(re.sub(r'"monologue.sampled_ids":"[^"]*",', "", whole))
    found = check(tmp_path / "run", "content")
    assert not found.ok and "has no ids" in (found.detail or "")
    file.write_text(whole.replace('"monologue.kind":"policy"', '"monologue.capture":"shape","monologue.kind":"policy"'))
    found = check(tmp_path / "run", "content")
    assert not found.ok and "was not to be captured" in (found.detail or "")


def test_every_text_passes_through_the_redaction(tmp_path: Path) -> None:
    ear = Ear()
    played(tmp_path / "run", SECRET, [ear], redact=lambda text: text.replace(SECRET, "[gone]"))
    written = on_disk(tmp_path / "run")
    assert SECRET not in written + ear.heard and "[gone]" in written and "broken by [gone]" in written and "harmless again" in written
    safe, told = RunReader(tmp_path / "run").episodes()
    assert safe.start.question == "harmless" and len(safe.calls()) == 1 and safe.calls()[0].trainable
    assert told.start.question == "[gone]" and told.start.choices == ("[gone]", "b") and told.start.gold == 0
    assert json.loads(str(told.spans[5].attributes[names.TOOL_ARGUMENTS])) == {"[gone]": ["[gone]"]}
    assert told.start.extra == {"note": "of [gone]", "temperature": 1.0, "control": "c", "capture": "redacted"}


def test_a_redacted_call_and_what_follows_it_in_its_stream_lose_ids_and_training(tmp_path: Path) -> None:
    played(tmp_path / "run", SECRET, redact=lambda text: text.replace(SECRET, "[gone]"))
    _, told = RunReader(tmp_path / "run").episodes()
    marks = [span.attributes.get(names.CAPTURE) for span in told.spans if names.POLICY in span.attributes]
    assert marks == [None, "redacted", "redacted", "redacted", "redacted"]
    assert [call.seq for call in told.calls()] == [0]
    for span in told.spans:
        if names.CAPTURE in span.attributes:
            assert span.attributes[names.TRAINABLE] is False and names.SAMPLED_LOGPROBS not in span.attributes
    assert check(tmp_path / "run", "prefix").ok
    assert check(tmp_path / "run", "content").detail == "not captured, so not checked: 4 redacted"


def test_a_redaction_of_everything_leaves_the_structure(tmp_path: Path) -> None:
    recorder = Recorder(RunWriter(tmp_path / "run"), redact=lambda text: "[gone]")
    uri = f"images/{'a' * 64}.png"
    parts = [
        {"type": "uri", "modality": "image", "uri": uri},
        {"type": "text", "content": SECRET},
        {"type": "choices", "choices": [SECRET]},
    ]
    action = {"kind": "tool", "name": "sum", "arguments": {SECRET: {SECRET: 1}}}
    with recorder.episode(problem_id="p", task="t", graph="g", group_id="p", question=SECRET) as episode:
        with episode.policy(role="questioner", node="ask") as span:
            messages = [json.dumps({"role": "user", "parts": parts})]
            span.record(**call((1,), output=SECRET, messages=messages, action=json.dumps(action)))
        episode.finish(answer=SECRET)
    [told] = RunReader(tmp_path / "run").episodes()
    facts = told.spans[0].attributes
    gone = [
        {"type": "uri", "modality": "image", "uri": uri},
        {"type": "text", "content": "[gone]"},
        {"type": "choices", "choices": ["[gone]"]},
    ]
    assert json.loads(str(facts[names.INPUT_MESSAGES])) == [{"role": "user", "parts": gone}]
    assert json.loads(str(facts[names.ACTION])) == {"kind": "tool", "name": "[gone]", "arguments": {"[gone]": {"[gone]": 1}}}
    assert facts[names.OUTPUT] == "[gone]" and told.end and told.end.answer == "[gone]" and SECRET not in on_disk(tmp_path / "run")


def bad(text: str) -> str:
    raise KeyError(text)


@pytest.mark.parametrize("redact", [bad, lambda text: None])
def test_a_redaction_that_breaks_ends_the_episode_and_writes_nothing_unredacted(tmp_path: Path, redact: Callable[[str], Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        played(tmp_path / "run", SECRET, redact=redact)
    assert SECRET not in on_disk(tmp_path / "run") and "harmless" not in on_disk(tmp_path / "run")


def test_an_unknown_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="capture must be 'all' or 'shape', got 'none'"):
        Recorder(RunWriter(tmp_path / "run"), capture="none")  # type: ignore[arg-type]


def test_the_command_line_plays_shapes_shows_them_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    words = ["play", "--backend", "scripted", "--capture", "shape", "--out", run]
    assert main([*words, "--n", "3"]) == 0
    first = capsys.readouterr().out
    assert "accuracy 1.000" in first and not list((tmp_path / "run" / "images").iterdir())
    assert main([*words, "--n", "4"]) == 0
    assert "accuracy 1.000" in (again := capsys.readouterr().out) and "3 of them from before" in again
    assert main(["verify", run]) == 0 and main(["view", run, "--list"]) == 0
    episode = next(RunReader(run).episodes()).start.episode_id
    assert main(["view", run, "--episode", episode]) == 0
    assert main(["play", "--backend", "scripted", "--n", "4", "--out", run]) == 2
    assert "capture='shape' (now 'all')" in capsys.readouterr().err


def test_an_own_question_stays_out_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (84, 84), "red").save(tmp_path / "own.png")
    own = ["--image", str(tmp_path / "own.png"), "--question", "what colour is the square ?", "--choices", "red", "blue"]
    assert main(["play", *own, "--capture", "shape", "--out", str(tmp_path / "run")]) == 0
    written = on_disk(tmp_path / "run")
    assert "what colour" not in written and '"red"' not in written and "own.png" not in written


TRACING = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2")


@pytest.mark.parametrize("name", TRACING)
def test_every_switch_that_would_ship_prompts_gets_its_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in TRACING:
        monkeypatch.delenv(other, raising=False)
    warn_of_uploads()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(name, "true")
    warn_of_uploads()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and name in told[0] and "unset it" in told[0]
    monkeypatch.setenv("LANGSMITH_OTEL_ENABLED", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere.example")
    warn_of_uploads()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "LANGSMITH_OTEL_ENABLED" in told[1] and "elsewhere.example" in told[1]


def test_an_instrumented_process_gets_its_line() -> None:
    code = "from opentelemetry import trace; from opentelemetry.sdk.trace import TracerProvider; from monologue.uploads import uploads\n"
    code += "print(list(uploads())); trace.set_tracer_provider(TracerProvider()); print(*uploads())"
    addresses = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:password@elsewhere.example:4318"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LANG", "OTEL"))} | addresses
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT)
    before, told = done.stdout.splitlines()
    assert before == "[]" and "OTEL_EXPORTER_OTLP_ENDPOINT" in told and "elsewhere.example" in told and "password" not in told


def test_switches_are_those_of_the_installed_langsmith(monkeypatch: pytest.MonkeyPatch) -> None:
    from langsmith import utils

    for name in TRACING:
        for other in TRACING:
            monkeypatch.delenv(other, raising=False)
        utils.get_env_var.cache_clear()
        assert not utils.tracing_is_enabled()
        monkeypatch.setenv(name, "true")
        utils.get_env_var.cache_clear()
        assert utils.tracing_is_enabled(), name
    monkeypatch.undo()
    utils.get_env_var.cache_clear()
