"""The store and the recorder: nothing finished is lost, nothing broken is taken for whole, every refusal is one sentence."""

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monologue.traces.codes import pack_floats, pack_ids, unpack_floats, unpack_ids
from monologue.traces.recorder import EpisodeRecorder, Recorder, shared_prefix
from monologue.traces.store import RunError, RunReader, RunWriter
from monologue.traces.verify import verify

ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50)
floats = st.lists(st.floats(width=32, allow_nan=False), max_size=50)


def facts(prompt: tuple[int, ...], sampled: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """What a policy call records."""
    call: dict[str, Any] = {"policy_id": "p", "weights_version": "0", "trainable": True, "prompt_ids": prompt, "sampled_ids": sampled}
    call |= {"sampled_logprobs": tuple(-0.5 for _ in sampled), "loss_mask": bytes([1]) * len(sampled), "sampling": {"temperature": 1.0}}
    call |= {"engine": "e", "engine_version": "1", "model": "m", "tokenizer_hash": "t", "template_hash": "l", "finish_reason": "stop"}
    call |= {"truncated": False, "images": (), "cached_tokens": None, "messages": [], "action": None, "parse_error": None, "output": "x"}
    return call | more


def begin(recorder: Recorder, name: str = "one") -> EpisodeRecorder:
    return recorder.episode(problem_id=name, task="t", graph="g", group_id=name, question="q ?", choices=("a", "b"), gold=0)


def play(run: Path, episodes: int = 1, turns: int = 3, new: int = 4) -> None:
    """Episodes of two growing streams."""
    recorder = Recorder(RunWriter(run, resume=True))
    for number in range(episodes):
        with begin(recorder, f"p{os.getpid()}/{number}") as episode:
            grown: dict[str, tuple[int, ...]] = {}
            for turn in range(turns):
                for role in ("questioner", "answerer"):
                    prompt = grown.get(role, ()) + tuple(range(turn, turn + new))
                    with episode.policy(role=role, node="ask") as span:
                        span.record(**facts(prompt, (7, 8)))
                        span.edge = "look"
                    grown[role] = (*prompt, 7, 8)
            episode.annotate(name="reward", value=1.0, source="test")
            episode.finish(answer="a")


@given(ids, floats)
def test_numbers_survive_as_strings_bit_for_bit(numbers: list[int], values: list[float]) -> None:
    assert unpack_ids(pack_ids(numbers)) == tuple(numbers)
    assert unpack_floats(pack_floats(values)) == tuple(values)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5))
def test_prompts_are_rebuilt_from_what_each_turn_added(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[list[int], list[int]]]
) -> None:
    run = tmp_path_factory.mktemp("run") / "r"
    wanted, grown = [], ()
    with begin(Recorder(RunWriter(run))) as episode:
        for new, sampled in turns:
            prompt = (*grown, *new)
            with episode.policy(role="questioner", node="ask") as span:
                span.record(**facts(prompt, tuple(sampled)))
            wanted.append((prompt, tuple(sampled)))
            grown = (*prompt, *sampled)
        episode.finish(answer=None)
    (found,) = RunReader(run).episodes()
    assert [(call.prompt_ids, call.sampled_ids) for call in found.calls()] == wanted


def test_an_episode_grows_linearly_on_disk(tmp_path: Path) -> None:
    sizes = {}
    for turns in (4, 64):
        play(tmp_path / str(turns), turns=turns)
        sizes[turns] = sum(file.stat().st_size for file in (tmp_path / str(turns) / "spans").iterdir()) / turns
    assert sizes[64] < 1.1 * sizes[4]
    assert sizes[64] / 2 < 8192  # bytes per policy call


def test_a_killed_process_loses_no_finished_turn_and_its_torn_line_is_counted(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_traces_store import *
recorder = Recorder(RunWriter(Path({str(tmp_path / "run")!r})))
with begin(recorder) as episode:
    grown = ()
    for turn in range(100000):
        with episode.policy(role="questioner", node="ask") as span:
            span.record(**facts((*grown, turn), (7,)))
        grown = (*grown, turn, 7)
        print(turn, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(50):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    told = [last, *(int(line) for line in process.stdout.read().split())]
    process.stdout.close()
    process.wait()
    reader = RunReader(tmp_path / "run")
    (episode,) = reader.episodes()
    assert not episode.complete and len(episode.calls()) >= told[-1] + 1
    (file,) = (tmp_path / "run" / "spans").iterdir()
    file.write_bytes(file.read_bytes() + b'{"record":"span","epi')
    again = RunReader(tmp_path / "run")
    assert len(next(again.episodes()).spans) == len(episode.spans) and list(again.episodes()) and again.torn == 1


def test_a_full_disk_is_one_sentence_and_leaves_no_broken_line(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); sys.path.insert(0, {str(Path(__file__).parent)!r})
import resource, signal
from pathlib import Path
from test_traces_store import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
play(Path({str(tmp_path / "run")!r}), episodes=50)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RunError: cannot write to the run" in done.stderr.splitlines()[-1]
    reader = RunReader(tmp_path / "run")
    assert [e for e in reader.episodes() if e.complete] and reader.torn == 0
    assert resource.RLIM_INFINITY  # the limit was the child's, not ours


def test_processes_that_write_one_run_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_traces_store import *
play(Path({str(tmp_path / "run")!r}), episodes=20)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    episodes = list(RunReader(tmp_path / "run").episodes())
    assert len(episodes) == len({e.start.episode_id for e in episodes}) == 80
    assert all(e.complete and len(e.calls()) == 6 for e in episodes) and all(check.ok for check in verify(tmp_path / "run"))


def test_a_named_pen_is_taken_up_after_a_crash_and_read_alone(tmp_path: Path) -> None:
    """A torn last line is cut off first, so the next record stands on a line of its own."""
    for name, problem in (("000001", "a"), ("000002", "b")):
        with begin(Recorder(RunWriter(tmp_path / "run", resume=True, name=name)), problem) as episode:
            episode.annotate(name="reward", value=1.0, source="test")
            episode.finish("a")
    for part in ("spans", "annotations"):
        with (tmp_path / "run" / part / "000002.jsonl").open("a") as file:
            file.write('{"record":"episode_st')
    with begin(Recorder(RunWriter(tmp_path / "run", resume=True, name="000002")), "c") as episode:
        episode.annotate(name="reward", value=0.5, source="test")
        episode.finish("b")
    found = {e.start.problem_id: [note.value for note in e.annotations] for e in RunReader(tmp_path / "run").episodes()}
    assert found == {"a": [1.0], "b": [1.0], "c": [0.5]}
    second = RunReader(tmp_path / "run", "000002")
    assert [e.start.problem_id for e in second.episodes()] == ["b", "c"] and second.torn == 0
    assert sorted(file.name for file in (tmp_path / "run" / "spans").iterdir()) == ["000001.jsonl", "000002.jsonl"]


def test_ids_do_not_repeat_when_a_trainer_seeds_everything(tmp_path: Path) -> None:
    recorder, seen = Recorder(RunWriter(tmp_path / "run")), set()
    for _ in range(2):
        random.seed(0)
        with begin(recorder) as episode:
            seen.add(episode.id)
            episode.finish(None)
    assert len(seen) == 2


def test_foreign_and_unwritable_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    play(tmp_path / "old")
    info = tmp_path / "old" / "run.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "schema_version": 99}))
    play(tmp_path / "mine")
    for refused, word in (
        (lambda: RunWriter(tmp_path / "file" / "run"), "cannot write"),
        (lambda: RunReader(tmp_path / "nothing"), "no run folder"),
        (lambda: RunReader(tmp_path / "old"), "schema version 99"),
        (lambda: RunWriter(tmp_path / "old", resume=True), "schema version 99"),
        (lambda: RunWriter(tmp_path / "mine"), "exists"),
    ):
        with pytest.raises(RunError, match=word) as error:
            refused()
        assert "\n" not in str(error.value)


def test_a_corrupt_line_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    play(tmp_path / "run")
    (file,) = (tmp_path / "run" / "spans").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b'{"record": "span", "typo": 1}\n', *lines[1:]]))
    with pytest.raises(RunError, match=rf"{file.name}, line 2"):
        list(RunReader(tmp_path / "run").episodes())
    assert not verify(tmp_path / "run")[0].ok


def test_failed_cancelled_and_unfinished_episodes_are_recorded_as_such(tmp_path: Path) -> None:
    recorder = Recorder(RunWriter(tmp_path / "run"))
    with pytest.raises(KeyError), begin(recorder) as episode, episode.tool(name="crop", arguments={"x": 1}, node="tools"):
        raise KeyError("gone")
    with pytest.raises(asyncio.CancelledError), begin(recorder):
        raise asyncio.CancelledError
    with pytest.raises(RuntimeError, match="without finish"), begin(recorder):
        pass
    with begin(recorder) as episode:
        episode.finish(answer=None)
    ends = [(e.end.status, e.complete) for e in RunReader(tmp_path / "run").episodes() if e.end]
    assert ends == [("failed", False), ("cancelled", False), ("failed", False), ("ok", True)]
    first = next(RunReader(tmp_path / "run").episodes())
    assert first.spans[0].status == "error" and "gone" in str(first.spans[0].attributes["monologue.error"])


def test_spans_keep_parents_order_edges_and_annotations(tmp_path: Path) -> None:
    recorder = Recorder(RunWriter(tmp_path / "run"))
    with begin(recorder) as episode:
        with episode.policy(role="questioner", node="ask") as outer:
            with episode.tool(name="zoom", arguments={}, node="tools", parent=outer.span) as inner:
                inner.result = "done"
            outer.record(**facts((1,), (2,)))
            outer.edge = "tool"
        episode.annotate(name="exact_match", value=0.0, source="task:t")
        episode.finish(answer="b")
    (found,) = RunReader(tmp_path / "run").episodes()
    call, tool = found.spans
    assert (call.seq, tool.seq) == (0, 1) and tool.parent_id == call.span_id and call.parent_id == found.start.root_span_id
    assert found.calls()[0].edge == "tool" and found.annotations[0].value == 0.0
    assert tool.attributes["gen_ai.tool.call.result"] == "done"


@pytest.mark.parametrize(
    ("prompt", "template", "cause"),
    [
        ((1, 2, 9, 5), "l", None),
        ((1, 2), "l", "truncated"),
        ((1, 2, 8, 5), "l", "retokenised"),
        ((4, 2, 9), "l", "context edited"),
        ((4,), "k", "template"),
    ],
)
def test_a_broken_prefix_has_a_cause(prompt: tuple[int, ...], template: str, cause: str | None) -> None:
    assert shared_prefix(prompt, (1, 2, 9), 2, "l", template) == ((3, None) if cause is None else (0, cause))


def edit(run: Path, change: Any) -> None:
    """Rewrites the run's spans through ``change``, a function of one record that returns it, or None to drop it."""
    (file,) = (run / "spans").iterdir()
    records = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records if record))


def with_attribute(name: str, value: Any) -> Any:
    def change(record: dict[str, Any]) -> dict[str, Any]:
        if record["record"] == "span" and record["seq"] == 2:
            record["attributes"][name] = value
        return record

    return change


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("spans", lambda record: None if record.get("seq") == 5 else record),
        ("prefix", with_attribute("monologue.prefix_length", 3)),
        ("lengths", with_attribute("monologue.loss_mask", "AQ==")),
        ("lengths", with_attribute("monologue.sampled_logprobs", pack_floats([0.5, -1.0]))),
        ("lengths", with_attribute("monologue.sampled_entropies", pack_floats([0.5]))),
        ("lengths", with_attribute("monologue.sampled_entropies", pack_floats([0.5, -1.0]))),
        ("parents", lambda record: {**record, "parent_id": "0" * 16} if record.get("seq") == 3 else record),
        ("episodes", lambda record: None if record["record"] == "episode_end" else record),
    ],
)
def test_each_breach_is_caught_by_its_own_check(tmp_path: Path, rule: str, change: Any) -> None:
    play(tmp_path / "run")
    assert all(check.ok for check in verify(tmp_path / "run"))
    edit(tmp_path / "run", change)
    broken = [check for check in verify(tmp_path / "run") if not check.ok]
    assert [check.name for check in broken] == [rule] and broken[0].detail


def test_a_cut_last_line_is_caught(tmp_path: Path) -> None:
    play(tmp_path / "run")
    (file,) = (tmp_path / "run" / "spans").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert {check.name for check in verify(tmp_path / "run") if not check.ok} == {"records", "episodes"}


def seen(run: Path, count: int = 4, pads: int = 4) -> Path:
    """A run of one call that saw a picture; returns the picture's file."""
    from monologue.traces.schema import ImageRef

    recorder = Recorder(RunWriter(run))
    with begin(recorder) as episode:
        picture = episode.store(Image.new("RGB", (28, 28), "red"))
        with episode.policy(role="answerer", node="answer") as span:
            image = ImageRef(picture.sha256, 28, 28, (1, 4, 4), 1, count, "h")
            span.record(**facts((0, *[5] * pads, 1), (2,), images=(image,)))
        episode.finish(answer="a")
    return run / "images" / f"{picture.sha256}.png"


def test_pictures_that_vanish_or_change_and_placeholders_that_do_not_fit_are_caught(tmp_path: Path) -> None:
    def broken(run: str) -> list[str]:
        return [check.name for check in verify(tmp_path / run) if not check.ok]

    seen(tmp_path / "sound")
    assert broken("sound") == []
    seen(tmp_path / "gone").unlink()
    assert broken("gone") == ["pictures"]
    Image.new("RGB", (28, 28), "blue").save(seen(tmp_path / "changed"))
    assert broken("changed") == ["pictures"]
    seen(tmp_path / "many", count=2, pads=4)
    assert broken("many") == ["placeholders"]
    seen(tmp_path / "few", count=4, pads=3)
    assert broken("few") == ["placeholders"]


def test_time_runs_forward_in_spans(tmp_path: Path) -> None:
    before = time.time_ns()
    play(tmp_path / "run")
    (episode,) = RunReader(tmp_path / "run").episodes()
    stamps = [stamp for span in episode.spans for stamp in (span.start_ns, span.end_ns)]
    assert stamps == sorted(stamps) and before <= stamps[0]


def test_a_call_says_who_answered_in_what_numbers_and_which_weights_sampled_which_token(tmp_path: Path) -> None:
    swapped = (("step-1", 0, 1), ("step-2", 1, 2))
    with begin(Recorder(RunWriter(tmp_path / "r"))) as episode:
        for more in ({"server": "http://10.0.0.7:30000", "dtype": "bfloat16", "weights": swapped}, {"server": "https://x/y"}, {}):
            with episode.policy(role="questioner", node="ask") as span:
                span.record(**facts((1, 2, 3), (7, 8), **more))
        episode.finish(answer="a")
    calls = [call for one in RunReader(tmp_path / "r").episodes() for call in one.calls()]
    assert [call.server for call in calls] == ["10.0.0.7:30000", "x:443", None]
    assert [call.dtype for call in calls] == ["bfloat16", None, None] and [call.weights for call in calls] == [swapped, (), ()]
