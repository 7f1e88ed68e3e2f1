"""Exports hand over ids, masks and log-probs bit for bit, say by name where a tool tokenises anew, and refuse what they cannot say.

That the tools' own loaders read these files is proven in ``tests_real/test_trainers.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from monologue.cli import main
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunWriter
from monologue.training.exports.trl import to_trl
from monologue.training.exports.verifiers import to_verifiers
from monologue.training.exports.verl import to_verl
from monologue.training.exports.writing import ExportError, _whole
from monologue.training.rows import Row, read_rows

datasets = pytest.importorskip("datasets", reason="the extra [datasets]")

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "max_tokens": 8}
FACTS: dict[str, Any] = {
    **{"policy_id": "p", "weights_version": "0", "trainable": True, "engine": "e", "engine_version": "1", "model": "m"},
    **{"tokenizer_hash": "t", "template_hash": "c", "finish_reason": "stop", "truncated": False, "images": (), "sampling": SAMPLING},
    **{"output": "red", "action": '{"kind": "reply", "text": "red"}', "parse_error": None, "cached_tokens": None},
    **{"messages": ('{"role": "user", "parts": [{"type": "text", "content": "colour?"}]}',)},
}


def load(file: Path, tmp_path: Path) -> Any:
    return datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]


def traces(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]


def branches(trace: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The nodes from each root on; ours have one child at most."""
    found: list[list[dict[str, Any]]] = []
    for index, node in enumerate(trace["nodes"]):
        if node["parent"] is None:
            found.append([])
        else:
            assert node["parent"] == index - 1
        found[-1].append(node)
    return found


def assert_exact(path: list[dict[str, Any]], row: Row) -> None:
    assert tuple(number for node in path for number in node["token_ids"]) == row.ids
    assert bytes(free for node in path for free in node["mask"]) == row.mask
    assert all(len(node["logprobs"]) == sum(node["mask"]) for node in path)
    assert row.logprobs is not None
    expected = [value for value, free in zip(row.logprobs, row.mask, strict=True) if free]
    assert [value for node in path for value in node["logprobs"]] == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policies, sampled: real log-probs, pictures, right and wrong answers."""
    folder = tmp_path_factory.mktemp("exports") / "run"
    assert main(["play", "--n", "6", "--samples", "2", "--temperature", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Writes a run of one episode whose calls are given as facts that differ from the usual ones."""

    def make(*calls: dict[str, Any], gold: int | None = 0, value: float | None = 1.0, name: str = "made") -> Path:
        writer = RunWriter(tmp_path / name)
        facts = {"problem_id": "p1", "task": "t", "graph": "g", "group_id": "p1", "question": "colour?", "choices": ("red", "blue")}
        with Recorder(writer).episode(**facts, gold=gold) as episode:
            for one in calls:
                role = one.pop("role", "a")
                with episode.policy(role=role, node="n") as span:
                    said = one["sampled_ids"]
                    usual = {**FACTS, "sampled_logprobs": (-0.5,) * len(said), "loss_mask": bytes([1]) * len(said)}
                    span.record(**{**usual, **one})
            episode.annotate(name="exact_match", value=value, scope="episode", source="test")
            episode.finish("red")
        writer.close()
        return tmp_path / name

    return make


def test_trl_gets_the_ids_and_a_label_wherever_the_loss_may_fall(run: Path, tmp_path: Path) -> None:
    report = to_trl(run, tmp_path / "out", ["questioner"], keep="all")
    rows, found = list(read_rows(run, ["questioner"])), load(tmp_path / "out" / "questioner.parquet", tmp_path)
    assert report.files == {"questioner.parquet": 12} and len(found) == len(rows) == 12
    for row, example in zip(rows, found, strict=True):
        assert tuple(example["input_ids"]) == row.ids
        assert example["labels"] == [number if free else -100 for number, free in zip(row.ids, row.mask, strict=True)]
        assert (example["episode_id"], example["stream"], example["row"]) == (row.episode_id, row.stream, row.number)


def test_ids_that_must_not_be_trained_have_no_label(made: Any, tmp_path: Path) -> None:
    folder = made({"prompt_ids": (1, 2), "sampled_ids": (7, 8, 9), "loss_mask": bytes([1, 0, 1])})
    to_trl(folder, tmp_path / "out")
    assert load(tmp_path / "out" / "a.parquet", tmp_path)[0]["labels"] == [-100, -100, 7, -100, 9]


def test_pictures_are_refused_as_ids_and_handed_over_under_another_name(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--shape messages"):
        to_trl(run, tmp_path / "out", ["answerer"])
    assert not list((tmp_path / "out").iterdir())  # not even a part of a file
    to_trl(run, tmp_path / "out", keep="all", shape="messages")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["answerer.retokenised.parquet", "questioner.retokenised.parquet"]
    seen = load(tmp_path / "out" / "answerer.retokenised.parquet", tmp_path)
    rows = list(read_rows(run, ["answerer"]))
    for row, example in zip(rows, seen, strict=True):
        places = [part["type"] for message in example["messages"] for part in message["content"]]
        assert [picture.size for picture in example["images"]] == [(84, 84)] * len(row.images) == [(84, 84)] * places.count("image")
        assert [message["role"] for message in example["messages"]] == ["user", "assistant"] * len(row.pieces)
    assert "images" not in load(tmp_path / "out" / "questioner.retokenised.parquet", tmp_path).column_names


def test_only_solved_episodes_are_imitated_unless_all_are_wanted(run: Path, tmp_path: Path) -> None:
    right = sum(row.reward("exact_match") == 1.0 for row in read_rows(run, ["questioner"]))
    report = to_trl(run, tmp_path / "out", ["questioner"])
    assert 0 < right == report.files["questioner.parquet"] < 12
    assert report.left_out == {"questioner: row of an episode that was not solved": 12 - right}


def test_verl_gets_every_problem_once_and_the_solved_dialogues(run: Path, tmp_path: Path) -> None:
    report = to_verl(run, tmp_path / "out")
    problems = load(tmp_path / "out" / "questioner.rl.parquet", tmp_path)
    assert [row["extra_info"]["index"] for row in problems] == list(range(6))
    assert len({row["extra_info"]["problem_id"] for row in problems}) == 6
    for row in problems:
        facts, reward = row["extra_info"], row["reward_model"]
        assert row["prompt"] == [{"role": "user", "content": f"{facts['question']}\nChoices: {', '.join(facts['choices'])}"}]
        assert row["data_source"] == "monologue/shapes" and row["ability"] == facts["family"]
        assert reward["style"] == "rule" and reward["ground_truth"] in facts["choices"]
    assert any("this seat first hears" in cause for cause in report.left_out) and "answerer.rl.parquet" not in report.files
    looked = load(tmp_path / "out" / "answerer.sft.retokenised.parquet", tmp_path)
    for row in looked:
        assert sum(message["content"].count("<image>") for message in row["messages"]) == len(row["images"])
    asked = load(tmp_path / "out" / "questioner.sft.retokenised.parquet", tmp_path)
    assert "images" not in asked.column_names and {message["role"] for message in asked[0]["messages"]} == {"user", "assistant", "tool"}


def test_a_seat_that_sees_the_problem_gets_it_with_its_picture(tmp_path: Path) -> None:
    assert main(["play", "--graph", "direct", "--backend", "scripted", "--n", "2", "--out", str(tmp_path / "run")]) == 0
    to_verl(tmp_path / "run", tmp_path / "out")
    row = load(tmp_path / "out" / "answerer.rl.parquet", tmp_path)[0]
    assert row["prompt"][-1]["content"].startswith("<image>") and [picture.size for picture in row["images"]] == [(84, 84)]


def test_a_problem_whose_answer_nobody_knows_is_counted_not_guessed(made: Any, tmp_path: Path) -> None:
    folder = made({"prompt_ids": (1,), "sampled_ids": (2,)}, gold=None)
    with pytest.raises(ExportError, match=r"nothing was left to write to a\.rl\.parquet"):
        to_verl(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("calls", "cause"),
    [
        ([{"prompt_ids": (1,), "sampled_ids": (2, 3), "loss_mask": bytes([1, 0])}], "must not be trained on"),
        ([{"prompt_ids": (1,), "sampled_ids": (2,), "truncated": True}], "cut off"),
        ([{"prompt_ids": (1,), "sampled_ids": (2,)}, {"prompt_ids": (9,), "sampled_ids": (2,)}], "known as ids only"),
        ([{"prompt_ids": (1,), "sampled_ids": (2,), "messages": ()}], "known as ids only"),
    ],
)
def test_rows_that_messages_would_tell_wrongly_are_left_out_and_counted(
    made: Any, tmp_path: Path, calls: list[dict[str, Any]], cause: str
) -> None:
    folder = made({"role": "b", "prompt_ids": (1,), "sampled_ids": (5,)}, *calls, {"role": "c", "prompt_ids": (1,), "sampled_ids": (5,)})
    broken = len(calls) > 1
    if broken:  # the first row of a stream that broke later still tells all that had been said
        report = to_trl(folder, tmp_path / "out", ["a"], shape="messages")
        assert report.files == {"a.retokenised.parquet": 1} and any(cause in why for why in report.left_out)
    else:
        with pytest.raises(ExportError, match="nothing was left"):
            to_trl(folder, tmp_path / "out", ["a"], shape="messages")


def test_text_that_verl_would_take_for_a_picture_is_refused(made: Any, tmp_path: Path) -> None:
    heard = json.dumps({"role": "user", "parts": [{"type": "text", "content": "what does <image> mean?"}]})
    folder = made({"prompt_ids": (1,), "sampled_ids": (2,), "messages": (heard,)})
    with pytest.raises(ExportError, match="place of a picture"):
        to_verl(folder, tmp_path / "out")


def test_verifiers_gets_every_row_bit_for_bit(run: Path, tmp_path: Path) -> None:
    report = to_verifiers(run, tmp_path / "out")
    rows = list(read_rows(run))
    found = {trace["id"]: trace for trace in traces(tmp_path / "out")}
    assert report.files == {"traces.jsonl": 24} and len(found) == len(rows) == 24
    for row in rows:
        trace = found[f"{row.episode_id}/{row.role}/{row.stream}"]
        (path,) = branches(trace)
        assert_exact(path, row)
        assert trace["rewards"] == {"exact_match": {"score": row.reward("exact_match"), "weight": 1.0}}
        shown = {row.ids[image.placeholder_start] for image in row.images}
        assert trace["mm_token_type_id_map"] == {str(number): 1 for number in shown}
        assert [call["usage"]["completion_tokens"] for call in trace["calls"]] == [piece.stop - piece.start for piece in row.pieces]
        assert all(trace["nodes"][call["node"]]["sampled"] for call in trace["calls"])


def test_a_stream_that_broke_is_one_trace_with_a_branch_a_row(made: Any, tmp_path: Path) -> None:
    folder = made(
        {"prompt_ids": (1, 2), "sampled_ids": (3,), "sampled_logprobs": (-0.1,)},
        {"prompt_ids": (1, 2, 3, 4), "sampled_ids": (5, 6), "sampled_logprobs": (-0.2, -1e-7), "loss_mask": bytes([0, 1])},
        {"prompt_ids": (9,), "sampled_ids": (9,), "sampled_logprobs": (-0.3,), "messages": ()},
    )
    to_verifiers(folder, tmp_path / "out")
    (trace,) = traces(tmp_path / "out")
    for path, row in zip(branches(trace), read_rows(folder), strict=True):
        assert_exact(path, row)
    turns = trace["info"]["monologue"]["turns"]
    rows = list(read_rows(folder))
    assert [turn.get("logprobs") for turn in turns] == [None, list(rows[0].pieces[1].logprobs or ()), None]


def test_a_call_without_log_probs_is_refused_where_it_would_read_as_certain(made: Any, tmp_path: Path) -> None:
    folder = made({"prompt_ids": (1,), "sampled_ids": (2,), "sampled_logprobs": None})
    with pytest.raises(ExportError, match="no log-probs"):
        to_verifiers(folder, tmp_path / "out")
    to_trl(folder, tmp_path / "out")


def test_a_picture_that_was_removed_is_named(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run" / "images").iterdir():
        file.unlink()
    for export in (to_verl, to_verifiers):
        with pytest.raises(ExportError, match="lacks the picture"):
            export(tmp_path / "run", tmp_path / "out", ["answerer"])


def test_the_command_writes_says_what_it_left_out_and_refuses_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool, file in (("trl", "questioner.parquet"), ("verl", "questioner.rl.parquet"), ("verifiers", "traces.jsonl")):
        assert main(["export", str(run), "--to", tool, "--role", "questioner", "--out", str(tmp_path / tool)]) == 0
        assert (tmp_path / tool / file).is_file()
    assert "left out, questioner: row of an episode that was not solved" in capsys.readouterr().out
    for wrong, said in (
        (["--to", "trl"], "have pictures"),
        (["--to", "verl", "--shape", "ids"], "--shape belongs to --to trl"),
        (["--to", "trl", "--role", "nobody"], "roles that it has: answerer, questioner"),
    ):
        assert main(["export", str(run), *wrong, "--out", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err


def test_without_the_library_the_install_line_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["export", str(run), "--to", "verl", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'monologue[datasets]'" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "verifiers", "--out", str(tmp_path / "out")]) == 0  # needs none


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(ValueError), _whole(tmp_path / "x") as partial:
        partial.write_text("new")
        raise ValueError
    assert (tmp_path / "x").read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["x"]
