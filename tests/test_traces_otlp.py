"""Runs as OpenTelemetry spans: what goes out as OTLP JSON comes back bit for bit, and nothing else is taken for it."""

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from monologue.cli import main
from monologue.traces import collector, names, otlp
from monologue.traces.collector import Forwarder, batches
from monologue.traces.extras import ExportError
from monologue.traces.otlp import Counts, from_json, to_json
from monologue.traces.recorder import EpisodeRecorder, Recorder
from monologue.traces.schema import Annotation, EpisodeEnd, EpisodeStart, SpanEvent, SpanRecord
from monologue.traces.spans import Span
from monologue.traces.store import Episode, RunError, RunReader, RunWriter

TEXT = 'ä „Anführung“ \u2028 \x00\x07 🂡 \\ " </script> {0}'
NEEDS_EXTRA = importlib.util.find_spec("opentelemetry.exporter") is None


def holds(run: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def play(run: Path) -> None:
    """Two writers with interleaved episodes of everything that a trace can hold; the last one fails."""
    writers = [RunWriter(run, {"note": TEXT}, resume=True) for _ in range(2)]
    for number in range(2):
        with begin(writers[number], extra={"list": [1, None, TEXT]}) as outer:
            with begin(writers[number], gold=1, sample_index=number) as inner:
                step(inner, number)
                inner.finish(answer=TEXT)
            outer.finish(answer=None)
    with pytest.raises(RuntimeError), begin(writers[0]) as last:
        step(last, 2)
        raise RuntimeError(TEXT)
    for writer in writers:
        writer.close()


def begin(writer: RunWriter, **more: Any) -> EpisodeRecorder:
    facts = {"problem_id": "p", "task": "t", "graph": "g", "group_id": "g0", "question": TEXT, "choices": (TEXT, "b")}
    return Recorder(writer).episode(**facts, **more)


def step(episode: EpisodeRecorder, number: int) -> None:
    """A picture, a call with a tool call inside, two annotations."""
    episode.store(Image.new("RGB", (5 + number, 7), "red"))
    with episode.policy(role="questioner", node="ask") as span:
        span.record(**call(number))
        span.span.add_event("looked", {"where": TEXT, "sure": 0.1, "often": 3, "well": True})
        with episode.tool(name="sum", arguments={"a": TEXT}, node="tools", parent=span.span) as tool:
            tool.result = TEXT
    episode.annotate(name="reward", value=0.1 + 0.2, source="test")
    episode.annotate(name="remark", text=TEXT, source="test", span_id="00000000000000ff", scope="turn")


def call(number: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"policy_id": "p", "weights_version": "0", "trainable": True, "prompt_ids": (1, 2, number)}
    facts |= {"sampled_ids": (7,), "sampled_logprobs": (-0.1,), "loss_mask": b"\1", "sampling": {"temperature": 1.0, "seed": 2**62}}
    facts |= {"engine": "e", "engine_version": "1", "model": "m", "tokenizer_hash": "t", "template_hash": "l", "finish_reason": "stop"}
    facts |= {"truncated": False, "images": (), "cached_tokens": 0, "messages": [], "action": None, "parse_error": TEXT, "output": TEXT}
    return facts


def both_ways(run: Path, scratch: Path) -> Counts:
    """Out and in again; the folders must not differ by a bit."""
    counts = to_json(run, scratch / "run.jsonl")
    again = from_json(scratch / "run.jsonl", scratch / "again")
    assert holds(scratch / "again") == holds(run)
    assert (again.records, again.episodes, again.pictures) == (counts.records, counts.episodes, counts.pictures)
    return counts


def test_a_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    play(tmp_path / "run")
    RunWriter(tmp_path / "run", resume=True).close()  # a writer that has written nothing
    counts = both_ways(tmp_path / "run", tmp_path)
    assert counts == Counts(records=22, episodes=5, pictures=3)
    wanted, found = (list(RunReader(tmp_path / name).episodes()) for name in ("run", "again"))
    assert wanted == found and [episode.calls() for episode in wanted] == [episode.calls() for episode in found]


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
number = st.integers(-(2**63), 2**63 - 1)
values = st.one_of(text, st.booleans(), number, st.floats(allow_nan=False, allow_infinity=False))
attributes = st.dictionaries(text, values, max_size=5)
events = st.builds(SpanEvent, name=text, time_ns=number, attributes=attributes)


@st.composite
def episodes(draw: st.DrawFn) -> list[Any]:
    """Records of one episode, as no recorder would write them but the schema allows them."""
    key = draw(st.text("0123456789abcdef", min_size=32, max_size=32))
    names = ("problem_id", "task", "graph", "group_id", "question", "family", "run_id")
    facts: dict[str, Any] = {name: draw(text) for name in names} | {"choices": tuple(draw(st.lists(text, max_size=3)))}
    extra = draw(st.dictionaries(text, st.one_of(values, st.lists(values, max_size=2)), max_size=3))
    start = {"episode_id": key, "root_span_id": "0" * 15 + "1", "sample_index": 0, "attempt": 0, "started_ns": draw(number), "gold": None}
    records: list[Any] = [EpisodeStart(**facts, **start, extra=extra)]
    for seq in range(draw(st.integers(0, 3))):
        kind, status = draw(st.sampled_from(("policy", "tool", "node"))), draw(st.sampled_from(("ok", "error")))
        ids = {"trace_id": draw(st.sampled_from((key, "f" * 32))), "span_id": f"{seq + 2:016x}", "parent_id": "0" * 16}
        times = {"start_ns": draw(number), "end_ns": draw(number)}
        more = {"attributes": draw(attributes), "events": tuple(draw(st.lists(events, max_size=2)))}
        records.append(SpanRecord(episode_id=key, seq=seq, name=draw(text), kind=kind, status=status, **ids, **times, **more))
    if draw(st.booleans()):
        answer, error = draw(st.one_of(st.none(), text)), draw(st.one_of(st.none(), text))
        ended = {"ended_ns": draw(number), "calls": 0, "spans": 0, "turns": 0, "status": draw(st.sampled_from(("ok", "failed")))}
        records.append(EpisodeEnd(episode_id=key, answer=answer, error=error, **ended))
    for _ in range(draw(st.integers(0, 2))):
        said = {
            "name": draw(text),
            "text": draw(st.one_of(st.none(), text)),
            "source": draw(text),
            "values": draw(st.one_of(st.none(), text)),
        }
        worth = {"value": draw(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))), "weight": 1.0, "created_ns": 5}
        records.append(Annotation(episode_id=key, span_id=None, scope="token", role=None, **said, **worth))
    return records


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(episodes(), max_size=3, unique_by=lambda records: records[0].episode_id))
def test_whatever_the_schema_allows_comes_back(tmp_path_factory: pytest.TempPathFactory, played: list[list[Any]]) -> None:
    scratch = tmp_path_factory.mktemp("any")
    writer = RunWriter(scratch / "run")
    for line in range(max((len(records) for records in played), default=0)):  # interleaved
        for records in played:
            if line < len(records):
                (writer.annotate if isinstance(records[line], Annotation) else writer.write)(records[line])
    writer.close()
    both_ways(scratch / "run", scratch)


def test_lines_are_what_the_protocol_says(tmp_path: Path) -> None:
    play(tmp_path / "run")
    to_json(tmp_path / "run", tmp_path / "run.jsonl")
    spans = []
    for line in (tmp_path / "run.jsonl").read_text().split("\n")[:-1]:
        [group] = json.loads(line)["resourceSpans"]
        resource = {one["key"]: one["value"] for one in group["resource"]["attributes"]}
        assert resource["openinference.project.name"] == {"stringValue": "monologue"}
        spans += [span for scope in group["scopeSpans"] for span in scope["spans"]]
    roots = [span for span in spans if "parentSpanId" not in span]
    assert len(roots) == 5 and len(spans) == 11
    for span in spans:
        assert len(bytes.fromhex(span["traceId"])) == 16 and len(bytes.fromhex(span["spanId"])) == 8
        assert isinstance(span["startTimeUnixNano"], str) and int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])
    rewards = [event for root in roots for event in root["events"] if event["name"] == "gen_ai.evaluation.result"]
    told = [{one["key"]: one["value"] for one in event["attributes"]} for event in rewards]
    assert [facts.get("gen_ai.evaluation.score.value") for facts in told] == [{"doubleValue": 0.1 + 0.2}, None] * 3
    assert {root["status"].get("code") for root in roots} == {None, 2}


def test_an_episode_that_never_ended_and_a_torn_line_do_not_stop_an_export(tmp_path: Path) -> None:
    play(tmp_path / "run")
    file = sorted((tmp_path / "run" / "spans").iterdir())[0]
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert to_json(tmp_path / "run", tmp_path / "run.jsonl").torn == 1
    from_json(tmp_path / "run.jsonl", tmp_path / "again")
    file.write_bytes(b"".join(lines[:-1]))
    assert holds(tmp_path / "again") == holds(tmp_path / "run")


def test_lines_of_another_program_come_back_as_equal_records(tmp_path: Path) -> None:
    play(tmp_path / "run")
    [*files] = sorted((tmp_path / "run" / "annotations").iterdir())
    for file in files:
        file.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in file.read_text().split("\n")[:-1]))
    assert to_json(tmp_path / "run", tmp_path / "run.jsonl").reformatted == 6
    from_json(tmp_path / "run.jsonl", tmp_path / "again")
    assert list(RunReader(tmp_path / "again").episodes()) == list(RunReader(tmp_path / "run").episodes())


def test_a_run_that_grows_meanwhile_is_exported_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path / "run")
    before = holds(tmp_path / "run")
    listed = otlp._files

    def grow(run: Path) -> dict[str, int]:
        found = listed(run)
        with begin(RunWriter(run, resume=True)) as episode:
            episode.finish(answer=None)
        for file in run.glob("*/*.jsonl"):
            file.write_bytes(file.read_bytes() * 2)
        return found

    monkeypatch.setattr(otlp, "_files", grow)
    to_json(tmp_path / "run", tmp_path / "run.jsonl")
    from_json(tmp_path / "run.jsonl", tmp_path / "again")
    assert holds(tmp_path / "again") == before


def cut(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[3][:-30]]


def other(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b'{"some": "line"}\n', *lines[2:]]


def headless(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def painted(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b"iVBOR", b"iVBOS"), *lines[2:]]


def outside(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b"spans/", b"../spans/"), *lines[1:]]


def newer(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'schema_version\\": 1', b'schema_version\\": 9'), *lines[1:]]


def broken(lines: list[bytes]) -> list[bytes]:
    return [
        line.replace(b'"kind":"policy"', b'"kind":"polly"').replace(b'{"stringValue":"policy"}', b'{"stringValue":"x"}') for line in lines
    ]


@pytest.mark.parametrize(
    "spoil, place, reason",
    [
        (cut, "line 4", "torn"),
        (other, "line 3", "resourceSpans"),
        (headless, "line 1", "first line is missing"),
        (painted, "line 2", "other bytes than its name says"),
        (outside, "line 1", "no file of a run"),
        (newer, "line 1", "schema version 9"),
        (broken, "line 8", "not a line that"),
        (lambda lines: lines[:-1], "after line 15", "cut off"),
        (lambda lines: [*lines[:-2], lines[-1]], "'records': 21", "lines were lost"),
        (lambda lines: [*lines[:6], lines[6], *lines[6:]], "line 8", "comes twice"),
        (lambda lines: [], "line 0", "cut off"),
        (lambda lines: [b"\xff\x00\n"], "line 1", "not a line that"),
        (lambda lines: [b"[" * 100_000 + b"\n"], "line 1", "not a line that"),
    ],
)
def test_what_is_no_whole_export_is_refused(tmp_path: Path, spoil: Callable[[list[bytes]], list[bytes]], place: str, reason: str) -> None:
    play(tmp_path / "run")
    to_json(tmp_path / "run", tmp_path / "run.jsonl")
    lines = (tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_bytes(b"".join(spoil(lines)))
    with pytest.raises(RunError) as refused:
        from_json(tmp_path / "bad.jsonl", tmp_path / "again")
    assert place in str(refused.value) and reason in str(refused.value) and "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "run", "run.jsonl"]


def orphan(run: Path) -> None:
    note = {"episode_id": "f" * 32, "span_id": None, "name": "n", "value": 1.0, "text": None, "weight": 1.0, "scope": "episode"}
    writer = RunWriter(run, resume=True)
    writer.annotate(Annotation(**note, role=None, source="s", created_ns=1))


def huge(run: Path) -> None:
    [file, *_] = sorted((run / "spans").iterdir())
    file.write_text(file.read_text().replace(f'"gen_ai.request.seed":{2**62}', f'"gen_ai.request.seed":{2**70}'))


def repainted(run: Path) -> None:
    next((run / "images").iterdir()).write_bytes(b"no picture")


@pytest.mark.parametrize("spoil, reason", [(orphan, "belong to no episode"), (huge, "64 bits"), (repainted, "another hash")])
def test_a_run_that_could_not_come_back_is_not_exported(tmp_path: Path, spoil: Callable[[Path], None], reason: str) -> None:
    play(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(RunError, match=reason):
        to_json(tmp_path / "run", tmp_path / "run.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_line_exports_and_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file, again = (str(tmp_path / name) for name in ("run", "run.jsonl", "again"))
    assert main(["play", "--backend", "scripted", "--n", "3", "--out", run]) == 0
    assert main(["export", run, "--to", "otlp-json", "--out", file]) == 0
    assert main(["import", file, "--out", again]) == 0
    assert "3 episodes" in capsys.readouterr().out and holds(tmp_path / "again") == holds(tmp_path / "run")
    assert main(["verify", again]) == 0


REFUSED = {
    "no run": (["export", "{nowhere}", "--to", "otlp-json", "--out", "{file}"], "is no run folder"),
    "no file": (["export", "{run}", "--to", "otlp-json"], "name it with --out FILE"),
    "no server": (["export", "{run}", "--to", "phoenix"], "name it with --endpoint"),
    "file to a server": (["export", "{run}", "--to", "otlp", "--endpoint", "http://127.0.0.1:9", "--out", "{file}"], "--out belongs to"),
    "server for a file": (["export", "{run}", "--to", "inspect", "--endpoint", "http://127.0.0.1:9", "--out", "{file}"], "writes a file"),
    "phoenix by grpc": (["export", "{run}", "--to", "phoenix", "--protocol", "grpc", "--endpoint", "http://127.0.0.1:9"], "--to otlp"),
    "unwritable": (["export", "{run}", "--to", "otlp-json", "--out", "{run}/run.json/x"], "cannot write the export"),
    "nothing to import": (["import", "{nowhere}", "--out", "{file}"], "No such file"),
    "into a run": (["import", "{run}/run.json", "--out", "{run}"], "exists already"),
    "no export": (["import", "{run}/run.json", "--out", "{file}"], "line 1: not a line that"),
    "live and shape": (["play", "--n", "1", "--out", "{file}", "--live", "--capture", "shape"], "give one of them"),
    "no address": (["play", "--n", "1", "--out", "{file}", "--otlp", "127.0.0.1:4318"], "expected an address such as"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_use_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(tmp_path / "run")
    words, reason = REFUSED[case]
    places = {name: str(tmp_path / name) for name in ("run", "file", "nowhere")}
    assert main([word.format(**places) for word in words]) == 2
    told = capsys.readouterr().err
    assert reason in told and len(told.splitlines()) == 1 and not (tmp_path / "file").exists()


@pytest.mark.skipif(not NEEDS_EXTRA, reason="the exporters are installed here")
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_missing_extra_is_named(protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(tmp_path / "run")
    words = ["export", str(tmp_path / "run"), "--to", "otlp", "--protocol", protocol, "--endpoint", "http://127.0.0.1:9"]
    assert main(words) == 2 and "pip install 'monologue[otlp]'" in capsys.readouterr().err
    if importlib.util.find_spec("inspect_ai") is None:
        assert main(["export", str(tmp_path / "run"), "--to", "inspect", "--out", str(tmp_path / "x.eval")]) == 2
        assert "pip install 'monologue[inspect]'" in capsys.readouterr().err


def span(size: int) -> Span:
    return Span("s", "0" * 31 + "1", "0" * 15 + "1", "", False, 0, 0, None, {"a": "x" * size})


def test_batches_hold_what_a_receiver_takes() -> None:
    sizes = [len(batch) for batch in batches([span(1000) for _ in range(10)], largest=5000, most=100)]
    assert sizes == [4, 4, 2]
    assert [len(batch) for batch in batches([span(10), span(9000), span(10)], largest=5000)] == [1, 1, 1]
    assert [len(batch) for batch in batches([span(1)] * 5, most=2)] == [2, 2, 1]
    assert list(batches([])) == []


class Slow:
    """A collector that takes its time, or does not take anything."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.endpoint, self.gate, self.taken = "http://slow", threading.Event(), 0
        self.breaks = False

    def spans_of(self, episode: Episode) -> Iterator[Span]:
        yield span(10)

    def send(self, batch: list[Span]) -> int:
        self.gate.wait(20)
        if self.breaks:
            raise ExportError("it is gone")
        self.taken += len(batch)
        return len(batch)

    def close(self) -> None:
        pass


def test_live_forwarding_never_waits_and_counts_what_it_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "Collector", Slow)
    forwarder = Forwarder(tmp_path / "run", "http://slow", depth=2)
    slow: Any = forwarder._collector
    writer = RunWriter(tmp_path / "run")
    writer.listener = forwarder
    started = time.monotonic()
    for number in range(8):
        with Recorder(writer).episode(problem_id=f"p{number}", task="t", graph="g", group_id="g", question="q") as episode:
            episode.finish(answer=None)
        time.sleep(0.05)  # the thread takes the first one out of the queue
    episode.annotate(name="late", value=1.0, source="test")
    assert time.monotonic() - started < 10  # the collector would have taken 8 x 20 seconds
    assert forwarder.dropped == 5 and len(list(RunReader(tmp_path / "run").episodes())) == 8
    slow.gate.set()
    told = forwarder.close()
    assert told == "3 episodes sent to http://slow, 5 dropped because the queue was full, 1 annotations came too late"


def test_live_forwarding_tells_what_did_not_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "Collector", Slow)
    forwarder = Forwarder(tmp_path / "run", "http://slow")
    slow: Any = forwarder._collector
    slow.breaks = True
    slow.gate.set()
    writer = RunWriter(tmp_path / "run")
    writer.listener = forwarder
    with Recorder(writer).episode(problem_id="p", task="t", graph="g", group_id="g", question="q") as episode:
        episode.finish(answer=None)
    assert forwarder.close() == "0 episodes sent to http://slow, 1 did not arrive; last error: it is gone"


def test_a_collector_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "Collector", Slow)
    forwarder = Forwarder(tmp_path / "run", "http://slow")
    slow: Any = forwarder._collector
    writer = RunWriter(tmp_path / "run")
    writer.listener = forwarder
    with Recorder(writer).episode(problem_id="p", task="t", graph="g", group_id="g", question="q") as episode:
        episode.finish(answer=None)
    assert forwarder.close(timeout=0.3) == "0 episodes sent to http://slow, 1 not sent within 0 seconds"
    slow.gate.set()


def test_names_are_kept_apart() -> None:
    fixed = [value for name, value in vars(names).items() if name.isupper()]
    assert len(set(fixed)) == len(fixed)
