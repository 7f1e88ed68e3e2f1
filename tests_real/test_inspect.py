"""An ``.eval`` log as inspect's own reader and its own viewer server read it."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import read_eval_log, read_eval_log_samples
from PIL import Image

from monologue.cli import main
from monologue.traces.extras import ExportError
from monologue.traces.inspect_log import to_inspect
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunError, RunReader, RunWriter


def play(run: Path, n: int = 3, samples: int = 2, *more: str) -> None:
    assert main(["play", "--backend", "scripted", "--n", str(n), "--samples", str(samples), "--out", str(run), *more]) == 0


def read(run: Path, file: Path) -> Any:
    assert main(["export", str(run), "--to", "inspect", "--out", str(file)]) == 0
    return read_eval_log(str(file), resolve_attachments=True)


def test_every_episode_is_a_sample_with_its_dialogue_pictures_and_scores(tmp_path: Path) -> None:
    run = tmp_path / "run"
    play(run)
    log = read(run, tmp_path / "run.eval")
    assert log.status == "success" and log.eval.run_id == RunReader(run).info["run_id"] and log.eval.config.epochs == 2
    assert log.results.total_samples == log.results.completed_samples == 6
    [score] = log.results.scores
    assert score.name == "exact_match" and score.metrics["mean"].value == 1.0 and score.metrics["stderr"].value == 0.0
    samples = {sample.metadata["episode_id"]: sample for sample in log.samples}
    assert len(samples) == 6 and len({(sample.id, sample.epoch) for sample in log.samples}) == 6
    for episode in RunReader(run).episodes():
        start, sample = episode.start, samples[episode.start.episode_id]
        assert (sample.id, sample.epoch) == (start.problem_id, start.sample_index + 1)
        assert start.gold is not None and sample.target == start.choices[start.gold] and sample.input == start.question
        assert sample.scores["exact_match"].value == 1.0 and sample.scores["exact_match"].metadata["source"] == "task:shapes"
        said = [message for message in sample.messages if message.role == "assistant"]
        assert [message.id for message in said] == [span.span_id for span in episode.spans if span.kind == "policy"]
        assert [message.text for message in said] == [call.output for call in episode.calls()]
        asked = [call.id for message in said for call in message.tool_calls or ()]
        assert asked == [message.tool_call_id for message in sample.messages if message.role == "tool"]
        assert all(call.function == "look" and "question" in call.arguments for message in said for call in message.tool_calls or ())
        shown = [
            part for message in sample.messages if isinstance(message.content, list) for part in message.content if part.type == "image"
        ]
        stored = {image.sha256 for call in episode.calls() for image in call.images}
        kept = {(run / "images" / f"{name}.png").read_bytes() for name in stored}
        assert {base64.b64decode(part.image.partition(",")[2]) for part in shown} == kept and len(shown) == len(kept)
        assert sample.model_usage["scripted-questioner"].output_tokens > 0


def test_a_tool_and_its_result_a_failure_and_a_second_attempt(tmp_path: Path) -> None:
    recorder = Recorder(RunWriter(tmp_path / "run", {"command": "test"}))
    facts: dict[str, Any] = {"problem_id": "p", "task": "t", "graph": "g", "group_id": "p", "question": "wieviel? „2“"}
    for attempt in range(2):
        with pytest.raises(RuntimeError), recorder.episode(**facts, attempt=attempt) as episode:
            with episode.policy(role="questioner", node="ask") as span:
                heard = {"role": "user", "parts": [{"type": "text", "content": "wieviel?"}]}
                span.record(**call(heard, {"kind": "tool", "name": "sum", "arguments": {"a": 1}}))
            with episode.tool(name="sum", arguments={"a": 1}, node="tools") as tool:
                tool.result = "2"
            with episode.policy(role="questioner", node="ask") as span:
                span.record(**call({"role": "tool", "parts": [{"type": "text", "content": "2"}]}, {"kind": "conclude", "answer": "2"}))
            episode.annotate(name="reward", value=0.5, source="one")
            episode.annotate(name="reward", value=-1.0, source="other")
            episode.annotate(name="advantage", value=0.1, source="one", span_id="00000000000000ff", scope="turn")
            raise RuntimeError("kaputt")
    log = read(tmp_path / "run", tmp_path / "run.eval")
    [sample] = log.samples
    assert sample.metadata["attempt"] == 1 and log.eval.metadata["superseded_attempts"] == 1
    assert sample.error.message == "RuntimeError: kaputt" and sample.input == "wieviel? „2“"
    assert [message.role for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    [asked] = sample.messages[1].tool_calls
    assert (asked.function, asked.arguments) == ("sum", {"a": 1})
    assert (sample.messages[2].tool_call_id, sample.messages[2].text) == (asked.id, "2")
    assert sorted(score.value for score in sample.scores.values()) == [-1.0, 0.5]
    assert sample.metadata["annotations"][0]["name"] == "advantage"
    assert log.results.scores[0].metrics["mean"].value == -0.25


def call(heard: dict[str, Any], action: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"policy_id": "p", "weights_version": "0", "trainable": True, "prompt_ids": (1, 2), "sampled_ids": (7,)}
    facts |= {"sampled_logprobs": (-0.1,), "loss_mask": b"\1", "sampling": {"temperature": 1.0}, "engine": "e", "engine_version": "1"}
    facts |= {"model": "m", "tokenizer_hash": "t", "template_hash": "l", "finish_reason": "stop", "truncated": False, "images": ()}
    return facts | {
        "cached_tokens": None,
        "messages": [json.dumps(heard)],
        "action": json.dumps(action),
        "parse_error": None,
        "output": "x",
    }


def test_several_graphs_of_one_run_stay_apart(tmp_path: Path) -> None:
    recorder = Recorder(RunWriter(tmp_path / "run"))
    for graph in ("direct", "monologue"):
        with recorder.episode(problem_id="p", task="t", graph=graph, group_id="p", question="q") as episode:
            episode.finish(answer=None)
    log = read(tmp_path / "run", tmp_path / "run.eval")
    assert [sample.id for sample in log.samples] == ["p (direct)", "p (monologue)"]


def test_the_shape_of_a_run_is_a_log_too(tmp_path: Path) -> None:
    play(tmp_path / "run", 2, 1, "--capture", "shape")
    log = read(tmp_path / "run", tmp_path / "run.eval")
    assert {sample.input for sample in log.samples} == {"(not captured)"} and log.results.scores[0].metrics["mean"].value == 1.0


def test_inspect_view_serves_the_log(tmp_path: Path) -> None:
    play(tmp_path / "run", 2, 1)
    assert to_inspect(tmp_path / "run", tmp_path / "logs" / "run.eval") == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(Path(sys.executable).parent / "inspect"), "view", "--log-dir", str(tmp_path / "logs"), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = patiently(f"http://127.0.0.1:{port}/api/logs")
        assert "run.eval" in told
    finally:
        process.terminate()
        process.wait(30)


def patiently(url: str) -> str:
    for _ in range(120):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"nobody answered at {url}")


def test_what_cannot_be_a_log_is_refused(tmp_path: Path) -> None:
    RunWriter(tmp_path / "empty").close()
    for run, file, reason in (
        ("nowhere", "x.eval", "is no run folder"),
        ("empty", "x.eval", "holds no episodes"),
        ("empty", "x.json", "ends in .eval"),
    ):
        with pytest.raises((ExportError, RunError), match=reason):
            to_inspect(tmp_path / run, tmp_path / file)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


MEASURE = """
import resource, sys
from monologue.traces.inspect_log import to_inspect
print(to_inspect(sys.argv[1], sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def megabytes(run: Path, wanted: int) -> int:
    """What a process of its own needs at most to write the log of a run."""
    words = [sys.executable, "-c", MEASURE, str(run), f"{run}.eval"]
    count, peak = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert int(count) == wanted
    return int(peak)


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """Pictures of half a megabyte: three hundred would be 210 MB as base64, all at once."""
    few, many = (with_pictures(tmp_path / str(count), count) for count in (40, 300))
    assert megabytes(many, 300) - megabytes(few, 40) < 60
    assert sum(1 for _ in read_eval_log_samples(f"{many}.eval")) == 300


def with_pictures(run: Path, count: int) -> Path:
    recorder = Recorder(RunWriter(run))
    for number in range(count):
        with recorder.episode(problem_id=f"p{number}", task="t", graph="g", group_id="p", question="q") as episode:
            sha256 = episode.store(Image.frombytes("RGB", (420, 420), os.urandom(420 * 420 * 3))).sha256
            with episode.policy(role="answerer", node="answer") as span:
                span.record(**call({"role": "user", "parts": [{"type": "uri", "modality": "image", "uri": f"images/{sha256}.png"}]}, {}))
            episode.finish(answer=None)
    return run
