"""Dialogues that somebody wrote: read, refused by file and line, played as they stand, imitated in a chat model's own ids."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from monologue.cli import main
from monologue.tasks.base import OracleTurn, TaskError
from monologue.tasks.dialogues import Dialogues
from monologue.traces.store import RunReader
from tests.chatting_models import save_text_model, save_vision_model
from tests.test_tasks_corpora import png

LINE: dict[str, Any] = {
    "id": "426",
    "question": "What will fall first?",
    "choices": ["the cup", "the book"],
    "answer": "the book",
    "image": "one.png",
    "turns": [
        {"question": "What leans over the edge?", "reply": "The book — “Möbius”."},
        {"question": "Where is the cup?", "reply": "In the middle."},
    ],
}


def written(folder: Path, *lines: Any, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "one.png").write_bytes(png("blue"))
    (folder / f"{split}.jsonl").write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return folder


def test_a_line_becomes_a_problem_whose_oracle_says_the_written_turns(tmp_path: Path) -> None:
    shown = {"bytes": base64.b64encode(png("red")).decode(), "path": None}
    folder = written(tmp_path / "d", LINE, {**LINE, "answer": 0, "image": shown, "family": "falls"})
    first, second = Dialogues(folder).problems("train")
    assert (first.gold, second.gold, second.family) == (1, 0, "falls") and first.id != second.id
    assert first.oracle == tuple(OracleTurn(**turn) for turn in LINE["turns"]) and first.explanation == ""
    assert [problem.pictures[0]().getpixel((0, 0)) for problem in (first, second)] == [(0, 0, 255), (255, 0, 0)]
    assert Dialogues(folder).score(first, "The Book") == 1.0 and Dialogues(folder).score(first, "the cup") == 0.0


def test_a_number_in_quotes_is_a_choices_text_and_no_index(tmp_path: Path) -> None:
    (problem,) = Dialogues(written(tmp_path / "d", {**LINE, "choices": ["1", "0"], "answer": "0"})).problems("train")
    assert problem.gold == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("{", "no JSON in UTF-8"),
        ("[1]", "no JSON object"),
        ({"question": " "}, 'words as "question"'),
        ({"question": "\ud800"}, "surrogates not allowed"),
        ({"choices": ["one"]}, '"choices", a list of two or more texts'),
        ({"choices": ["one", ""]}, "words as choice 1"),
        ({"answer": 2}, "an index from 0 to 1 or the text of one choice, got 2"),
        ({"answer": -1}, "got -1"),
        ({"answer": True}, "got True"),
        ({"answer": "The book"}, "got 'The book'"),
        ({"choices": ["the book", "the book"]}, "the text of one choice"),
        ({"image": None}, 'expected "image"'),
        ({"image": "two.png"}, "inside .*two.png"),
        ({"image": "../out.png"}, r"inside .*\.\./out.png"),
        ({"image": "x" * 5000}, "inside"),
        ({"image": {"bytes": "no base64!"}}, "as base64"),
        ({"turns": []}, '"turns", a list of one or more'),
        ({"turns": None}, '"turns", a list of one or more'),
        ({"turns": [{"question": "what ?"}]}, "turn 1 as"),
        ({"turns": [LINE["turns"][0], {"question": "", "reply": "So it is the book."}]}, "words as the question of turn 2"),
        ({"turns": [{"question": "what ?", "reply": 3}]}, "words as the reply of turn 1, got 3"),
        ({"turns": [{"question": "what ?", "reply": "a", "note": "b"}]}, "no other keys"),
    ],
    ids=str,
)
def test_every_fault_is_named_with_file_and_line(tmp_path: Path, fault: Any, told: str) -> None:
    (tmp_path / "out.png").write_bytes(png("red"))
    line = fault if isinstance(fault, str) else {**LINE, **fault}
    with pytest.raises(TaskError, match=f"(?s)line 2 of .*train.jsonl.*{told}|{told}.*line 2 of .*train.jsonl"):
        list(Dialogues(written(tmp_path / "d", LINE, line)).problems("train"))


def test_a_picture_that_is_none_is_named_with_its_line_when_it_is_looked_at(tmp_path: Path) -> None:
    folder = written(tmp_path / "d", LINE)
    (folder / "one.png").write_text("no picture")
    (problem,) = Dialogues(folder).problems("train")
    with pytest.raises(TaskError, match=r"line 1 of .*cannot be opened"):
        problem.pictures[0]()


def test_the_folder_is_asked_for_where_files_are_read_and_refused_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(written(tmp_path / "d"))
    for words, told in (
        (["play", "--task", "dialogues"], "add --folder DIR"),
        (["eval", "--task", "scienceqa"], "add --folder DIR"),
        (["tasks", "dialogues"], "add --folder DIR"),
        (["play", "--task", "hops", "--folder", folder], "leave it out"),
        (["play", "--task", "dialogues", "--folder", folder, "--families", "near"], "families belong"),
        (["play", "--task", "dialogues", "--folder", folder + "x"], "expected a folder"),
        (["play", "--task", "dialogues", "--folder", folder], r"test*.jsonl"),
        (["play", "--task", "dialogues", "--folder", folder, "--split", "train"], "found none"),
        (["play", "--image", "x.png", "--question", "what ?", "--choices", "a", "b", "--folder", folder], "--folder cannot be honoured"),
    ):
        out = ["--out", str(tmp_path / "r")] if words[0] == "play" else []
        assert main([*words, *out]) == 2
        assert told in capsys.readouterr().err, words
    assert not (tmp_path / "r").exists()


def test_a_dialogue_longer_than_its_budget_is_refused_and_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "d", LINE, {**LINE, "turns": LINE["turns"] * 5})
    words = ["play", "--task", "dialogues", "--folder", str(folder), "--split", "train", "--backend", "scripted"]
    assert main([*words, "--out", str(tmp_path / "r")]) == 2
    assert "add --max-turns 11" in capsys.readouterr().err and not (tmp_path / "r").exists()
    assert main([*words, "--out", str(tmp_path / "r"), "--max-turns", "11"]) == 0
    assert "accuracy 1.000" in capsys.readouterr().out


def test_tasks_shows_written_dialogues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "dialogues", "--folder", str(written(tmp_path / "d", LINE)), "--split", "train"]) == 0
    assert "Where is the cup?" in capsys.readouterr().out
    assert main(["tasks"]) == 0 and "dialogues" in capsys.readouterr().out


@pytest.mark.parametrize(("role", "save"), [("questioner", save_text_model), ("answerer", save_vision_model)])
def test_a_real_chat_model_learns_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, save: Any) -> None:
    run, folder = tmp_path / "run", written(tmp_path / "d", LINE, {**LINE, "answer": 0})
    words = ["play", "--task", "dialogues", "--folder", str(folder), "--split", "train", "--backend", "scripted", "--out", str(run)]
    assert main(words) == 0 and "accuracy 1.000" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 0
    save(tmp_path / "model")
    train = ["train", "imitate", "imitate", "--set", f'run="{run}"', "--set", f'role="{role}"', "--set", "steps=3", "--set", "lr=1e-2"]
    assert main([*train, "--start", str(tmp_path / "model"), "--retokenize", "--out", str(tmp_path / "student")]) == 0
    assert "2 episodes said again" in capsys.readouterr().out
    reader = RunReader(tmp_path / "student" / "retokenised")
    said = [[json.loads(call.action or "{}") for call in one.calls() if call.role == role] for one in reader.episodes()]
    replies = [{"kind": "reply", "text": turn["reply"]} for turn in LINE["turns"]]
    looks = [{"kind": "look", "question": turn["question"]} for turn in LINE["turns"]]
    ends = [[{"kind": "conclude", "answer": choice}] for choice in ("the cup", "the book")]
    assert sorted(said, key=str) == ([replies] * 2 if role == "answerer" else sorted(([*looks, *end] for end in ends), key=str))
