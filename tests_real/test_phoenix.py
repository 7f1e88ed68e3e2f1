"""A real Phoenix on loopback: what is sent by http and grpc, stored or live, is what its own API gives back.

Runs from .venv-phoenix, which tests_real/install_phoenix.sh makes: ``make test-phoenix``.
"""

import base64
import html
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from monologue.cli import main
from monologue.traces import names
from monologue.traces.collector import Forwarder, send
from monologue.traces.extras import ExportError
from monologue.traces.otlp import to_json
from monologue.traces.phoenix import annotate, to_phoenix
from monologue.traces.schema import Annotation
from monologue.traces.store import Episode, RunReader, RunWriter

PATIENCE = 180.0
"""Seconds that the server may take to start, on a busy machine."""


@dataclass(frozen=True)
class Server:
    """A Phoenix that is up."""

    http: str
    grpc: str

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.http}/v1/{path}", timeout=60) as answer:
            return json.load(answer)["data"]

    def spans(self, project: str, wanted: int) -> dict[str, Any]:
        """The project's spans by id, once as many as wanted are there: Phoenix takes them in behind a queue."""
        until = time.monotonic() + 60
        while True:
            try:
                found = self.get(f"projects/{project}/spans?limit=1000")
            except urllib.error.HTTPError as error:
                assert error.code == 404, error
                found = []
            if len(found) >= wanted or time.monotonic() > until:
                assert len(found) == wanted
                return {span["context"]["span_id"]: span for span in found}
            time.sleep(0.3)

    def annotations(self, project: str, spans: list[str]) -> list[dict[str, Any]]:
        query = "&".join(f"span_ids={span}" for span in spans)
        found: list[dict[str, Any]] = self.get(f"projects/{project}/span_annotations?limit=1000&{query}")
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("phoenix")
    http, grpc = free_port(), free_port()
    settings = {"PHOENIX_WORKING_DIR": str(folder), "PHOENIX_HOST": "127.0.0.1", "PHOENIX_TELEMETRY_ENABLED": "false"}
    settings |= {"PHOENIX_PORT": str(http), "PHOENIX_GRPC_PORT": str(grpc)}
    with (folder / "log").open("wb") as log:
        words = [str(Path(sys.executable).parent / "phoenix"), "serve"]
        process = subprocess.Popen(words, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT)
    try:
        server = Server(f"http://127.0.0.1:{http}", f"http://127.0.0.1:{grpc}")
        wait_for(f"{server.http}/healthz", process, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"Phoenix did not start: {log.read_text()[-2000:]}")


Player = Callable[..., Path]


@pytest.fixture
def played(tmp_path: Path) -> Player:
    """Plays a few dialogues: real graph, real pictures, scripted replies."""

    def play(name: str = "run", n: int = 3, *more: str) -> Path:
        run = tmp_path / name
        assert main(["play", "--backend", "scripted", "--n", str(n), "--out", str(run), *more]) == 0
        return run

    return play


def matches(run: Path, spans: dict[str, Any]) -> None:
    """Every span of the run is there, under its parent, with its messages and its pictures in them."""
    wanted = 0
    for episode in RunReader(run).episodes():
        root = spans[episode.start.root_span_id]
        assert root["parent_id"] is None and root["span_kind"] == "AGENT" and root["status_code"] == "OK"
        assert root["attributes"]["llm.input_messages.0.message.content"].startswith(episode.start.question)
        wanted += 1 + len(episode.spans)
        for span in episode.spans:
            found = spans[span.span_id]
            assert found["parent_id"] == span.parent_id and found["context"]["trace_id"] == episode.start.episode_id
            assert found["span_kind"] == ("LLM" if span.kind == "policy" else "TOOL") and found["name"] == span.name
            assert found["attributes"]["session.id"] == episode.start.episode_id
            shows(run, span.attributes, found["attributes"])
    assert len(spans) == wanted


def shows(run: Path, wanted: Any, found: dict[str, Any]) -> None:
    """The chat view's fields: who says what, with which picture."""
    heard = json.loads(wanted[names.INPUT_MESSAGES])
    assert heard
    for number, message in enumerate(heard):
        base = f"llm.input_messages.{number}.message."
        assert found[f"{base}role"] == message["role"]
        told = [value for name, value in found.items() if name.startswith(base)]
        for part in message["parts"]:
            if part["type"] == "uri":
                png = (run / part["uri"]).read_bytes()
                assert any(isinstance(value, str) and value.endswith(base64.b64encode(png).decode()) for value in told)
            elif part["type"] == "text":
                assert part["content"] in told
            elif part["type"] == "choices":
                assert "\n".join(f"- {choice}" for choice in part["choices"]) in told
    assert found["llm.output_messages.0.message.content"] == wanted[names.OUTPUT]
    assert found["llm.token_count.prompt"] == wanted[names.INPUT_TOKENS]
    for name in (names.SAMPLED_IDS, names.SAMPLED_LOGPROBS, names.PROMPT_DELTA, names.LOSS_MASK):
        assert found.get(name) == wanted.get(name)


def pictures(spans: dict[str, Any]) -> int:
    return sum(str(value).startswith("data:image/png;base64,") for span in spans.values() for value in span["attributes"].values())


def count(run: Path) -> int:
    return sum(1 + len(episode.spans) for episode in RunReader(run).episodes())


def episodes(run: Path) -> list[Episode]:
    return list(RunReader(run).episodes())


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_stored_run_arrives_whole(phoenix: Server, played: Player, protocol: Any) -> None:
    run = played()
    assert send(run, getattr(phoenix, protocol), protocol, project=f"stored-{protocol}") == count(run)
    spans = phoenix.spans(f"stored-{protocol}", count(run))
    matches(run, spans)
    assert pictures(spans) >= 3


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_run_arrives_while_it_is_played(phoenix: Server, played: Player, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    project = f"live-{protocol}"
    run = played("run", 4, "--otlp", getattr(phoenix, protocol), "--protocol", protocol, "--project", project)
    assert f"monologue: 4 episodes sent to {getattr(phoenix, protocol)}\n" in capsys.readouterr().err
    matches(run, phoenix.spans(project, count(run)))


def test_rewards_are_annotations(phoenix: Server, played: Player, capsys: pytest.CaptureFixture[str]) -> None:
    run = played()
    writer = RunWriter(run, resume=True)
    for episode in episodes(run):
        facts: dict[str, Any] = {"episode_id": episode.start.episode_id, "span_id": episode.spans[1].span_id, "created_ns": 1, "role": None}
        writer.annotate(Annotation(**facts, name="advantage", value=-0.125, text=None, weight=0.5, scope="turn", source="test"))
        writer.annotate(Annotation(**facts, name="remark", value=None, text="gut, aber „lang“", weight=1.0, scope="turn", source="test"))
    writer.close()
    words = ["export", str(run), "--to", "phoenix", "--endpoint", phoenix.http, "--project", "rewards"]
    assert main(words) == 0
    assert f"{count(run)} spans and 9 annotations" in capsys.readouterr().out
    assert annotate(run, phoenix.http) == 9  # a second time replaces, and doubles nothing
    roots = [episode.start.root_span_id for episode in episodes(run)]
    found = phoenix.annotations("rewards", roots)
    assert {note["span_id"] for note in found} == set(roots) and len(found) == 3
    for note in found:
        assert note["name"] == "exact_match" and note["result"]["score"] == 1.0 and note["annotator_kind"] == "CODE"
        assert note["metadata"] == {"weight": 1.0, "scope": "episode", "source": "task:shapes"}
    turns = phoenix.annotations("rewards", [episode.spans[1].span_id for episode in episodes(run)])
    assert sorted({(note["name"], note["result"]["score"], note["result"]["explanation"]) for note in turns}, key=str) == [
        ("advantage", -0.125, None),
        ("remark", None, "gut, aber „lang“"),
    ]
    assert len(turns) == 6


def test_the_chat_view_shows_dialogue_picture_and_reward(phoenix: Server, played: Player, tmp_path: Path) -> None:
    """What a browser has on its page, once Phoenix's own interface has drawn the span."""
    browser = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium on this machine")
    run = played()
    to_phoenix(run, phoenix.http, "chat")
    episode = episodes(run)[0]
    call = next(call for call in episode.calls() if call.role == "answerer")
    words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    words += ["--window-size=1500,1400", "--virtual-time-budget=60000", f"{phoenix.http}/redirects/spans/{call.span_id}"]
    page = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=240, check=True).stdout
    picture, heard = json.loads(call.messages[0])["parts"]
    png = (run / picture["uri"]).read_bytes()
    assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}"' in page
    assert html.escape(heard["content"]) in page and html.escape(call.output) in page
    assert "exact_match" in page and "invoke_agent monologue" in page


def test_a_failed_episode_is_shown_as_one(phoenix: Server, tmp_path: Path) -> None:
    from monologue.traces.recorder import Recorder

    recorder = Recorder(RunWriter(tmp_path / "run"))
    facts: dict[str, Any] = {"problem_id": "p", "task": "t", "graph": "g", "group_id": "p", "question": "warum?"}
    with pytest.raises(RuntimeError), recorder.episode(**facts) as episode, episode.tool(name="sum", arguments={"a": 1}, node="tools"):
        raise RuntimeError("kaputt")
    assert send(tmp_path / "run", phoenix.http, project="failed") == 2
    spans = phoenix.spans("failed", 2)
    assert {span["status_code"] for span in spans.values()} == {"ERROR"}
    assert {span["status_message"] for span in spans.values()} == {"RuntimeError: kaputt"}


def test_large_pictures_go_in_batches(phoenix: Server, tmp_path: Path) -> None:
    """Sixty pictures of two megabytes: more than the exporter takes at once, and each nearly what a gRPC receiver takes."""
    from PIL import Image

    from monologue.traces.recorder import Recorder

    recorder = Recorder(RunWriter(tmp_path / "run"))
    for number in range(60):
        noise = Image.frombytes("RGB", (800, 800), os.urandom(800 * 800 * 3))
        problem = {"problem_id": f"p{number}", "task": "t", "graph": "g", "group_id": "g", "question": "q"}
        with recorder.episode(**problem) as episode:  # type: ignore[arg-type]
            sha256 = episode.store(noise).sha256
            said = {"role": "user", "parts": [{"type": "uri", "modality": "image", "uri": f"images/{sha256}.png"}]}
            with episode.policy(role="answerer", node="answer") as span:
                span.record(**call(json.dumps(said)))
            episode.finish(answer=None)
    assert send(tmp_path / "run", phoenix.grpc, "grpc", project="large") == 120
    until = time.monotonic() + 120
    while (roots := len(phoenix.get("projects/large/traces?limit=100"))) < 60 and time.monotonic() < until:
        time.sleep(1)
    assert roots == 60


def call(message: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"policy_id": "p", "weights_version": "0", "trainable": True, "prompt_ids": (1, 2), "sampled_ids": (7,)}
    facts |= {"sampled_logprobs": (-0.1,), "loss_mask": b"\1", "sampling": {"temperature": 1.0}, "engine": "e", "engine_version": "1"}
    facts |= {"model": "m", "tokenizer_hash": "t", "template_hash": "l", "finish_reason": "stop", "truncated": False, "images": ()}
    return facts | {"cached_tokens": None, "messages": [message], "action": None, "parse_error": None, "output": "x"}


def test_the_shape_of_a_run_is_sent_as_such(phoenix: Server, played: Player) -> None:
    run = played("run", 2, "--capture", "shape")
    send(run, phoenix.http, project="shape")
    spans = phoenix.spans("shape", count(run))
    assert pictures(spans) == 0 and not any(names.INPUT_MESSAGES in span["attributes"] for span in spans.values())
    assert all(span["attributes"]["llm.token_count.prompt"] > 0 for span in spans.values() if span["span_kind"] == "LLM")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_does_not_arrive_is_an_error(phoenix: Server, played: Player, protocol: Any) -> None:
    run = played()
    with pytest.raises(ExportError, match="nobody listens"):
        send(run, f"http://127.0.0.1:{free_port()}", protocol)
    wrong = f"{phoenix.http}/v1/projects" if protocol == "http" else phoenix.http
    with pytest.raises(ExportError, match="spans did not reach"):
        send(run, wrong, protocol)
    with pytest.raises(ExportError, match="refused the annotations"):
        annotate(run, f"{phoenix.http}/elsewhere")
    next((run / "images").iterdir()).unlink()
    with pytest.raises(ExportError, match="the run lacks the picture"):
        send(run, getattr(phoenix, protocol), protocol, project="lacking")


def test_live_forwarding_outlives_its_collector(played: Player, tmp_path: Path) -> None:
    """The collector goes away in the middle: the run on disk is whole, the loss is told."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        forwarder = Forwarder(tmp_path / "run", f"http://127.0.0.1:{door.getsockname()[1]}")
    writer = RunWriter(tmp_path / "run")
    writer.listener = forwarder
    source = episodes(played("source", 2))
    for episode in source:
        for record in (episode.start, *episode.spans, episode.end):
            assert record is not None
            writer.write(record)
    told = forwarder.close(timeout=60)
    assert "0 episodes sent" in told and "2 did not arrive" in told, told
    assert [episode.start for episode in episodes(tmp_path / "run")] == [episode.start for episode in source]


def test_exported_lines_are_protobuf_json(played: Player, tmp_path: Path) -> None:
    """What the official protobuf classes read of our file is what we sent, ids and all."""
    from google.protobuf import json_format
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    run = played()
    to_json(run, tmp_path / "run.jsonl")
    seen = set()
    for line in (tmp_path / "run.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        plain = json.loads(line)
        for group in plain["resourceSpans"]:
            for span in (span for scope in group["scopeSpans"] for span in scope["spans"]):
                for key in ("traceId", "spanId", "parentSpanId"):  # protobuf's own JSON has base64 where OTLP has hex
                    if key in span:
                        span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
        request = json_format.ParseDict(plain, ExportTraceServiceRequest())
        seen |= {span.span_id.hex() for group in request.resource_spans for scope in group.scope_spans for span in scope.spans}
    wanted = {span.span_id for episode in episodes(run) for span in episode.spans}
    assert seen == wanted | {episode.start.root_span_id for episode in episodes(run)}
