"""ScienceQA and M3CoT in the columns of their authors, rationales cut as IVT-LR cuts them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from monologue.tasks.base import TaskError
from monologue.tasks.corpora import Corpus, split_rationale
from monologue.training.rationales import RationaleError, of_problem

SCIENCE = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
    "answer": 0,
    "hint": "",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map: cardinal directions",
    "lecture": "Maps have four cardinal directions. Those are north, south, east, and west.\nA compass rose helps.",
    "solution": "Look at the compass rose. West Virginia is farthest north.",
}
M3COT = {
    "id": "physical-commonsense-1426",
    "category": "physical-commonsense",
    "question": "What will fall first?",
    "choices": ["the cup", "the book"],
    "context": "",
    "answer": "B",
    "rationale": "The book leans over the edge. The cup stands in the middle.",
    "split": "train",
    "domain": "commonsense",
    "topic": "physical-commonsense",
}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


def written(folder: Path, records: list[dict[str, Any]], split: str = "train") -> Path:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def shown(record: dict[str, Any], colour: str = "red") -> dict[str, Any]:
    return {**record, "image": {"bytes": base64.b64encode(png(colour)).decode(), "path": "image.png"}}


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("One. Two. Three.", ("One", "Two", "Three.")),
        ("One. Two. ", ("One", "Two.")),  # stripped first, so the tail is no empty step but keeps its full stop
        ("One.\nTwo", ("One", "Two")),
        ("a. b. c. d", ("a. b", "c", "d")),
        ("a. b. c. d. e", ("a. b", "c. d", "e")),
        ("a. b. c. d. e. f. g", ("a. b. c", "d. e", "f. g")),
        ("only one", ("only one",)),
    ],
)
def test_a_rationale_is_cut_as_the_release_cuts_it(text: str, steps: tuple[str, ...]) -> None:
    assert split_rationale(text) == steps


def test_scienceqa_says_lecture_then_solution(tmp_path: Path) -> None:
    (problem,) = Corpus("scienceqa", written(tmp_path, [shown(SCIENCE)])).problems("train")
    assert problem.choices[problem.gold or 0] == "West Virginia"
    assert problem.extra["steps"] == [
        "Maps have four cardinal directions. Those are north, south, east, and west",
        "A compass rose helps. Look at the compass rose",
        "West Virginia is farthest north.",
    ]
    assert problem.family == "social science" and problem.pictures[0]().getpixel((3, 3)) == (255, 0, 0)


def test_m3cot_answers_by_letter(tmp_path: Path) -> None:
    (problem,) = Corpus("m3cot", written(tmp_path, [shown(M3COT)])).problems("train")
    assert problem.choices[problem.gold or 0] == "the book" and problem.family == "commonsense"
    assert of_problem(problem).steps[1].gist == "The"


def test_items_without_a_picture_are_left_out(tmp_path: Path) -> None:
    folder = written(tmp_path, [{**M3COT, "image": None}, shown(M3COT), {**SCIENCE, **M3COT, "image": None}])
    assert [problem.id for problem in Corpus("m3cot", folder).problems("train")] == ["m3cot/train/1"]


def test_a_picture_may_be_a_file_inside_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", tmp_path / "secret.png"
    inside.mkdir()
    (inside / "one.png").write_bytes(png("blue"))
    outside.write_bytes(png("red"))
    first, second = Corpus("m3cot", written(inside, [{**M3COT, "image": "one.png"}, {**M3COT, "image": "../secret.png"}])).problems("train")
    assert first.pictures[0]().getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(TaskError, match=r"\.\./secret\.png"):
        second.pictures[0]()


def test_parquet_as_the_hub_has_it_reads_like_json_lines(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [{**SCIENCE, "image": {"bytes": png("green"), "path": None}}, {**SCIENCE, "image": None}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "test-00000-of-00001.parquet")
    (problem,) = Corpus("scienceqa", tmp_path).problems("test")
    assert problem.pictures[0]().getpixel((0, 0)) == (0, 128, 0) and len(problem.extra["steps"]) == 3


@pytest.mark.parametrize(
    "fault", [{"answer": 7}, {"answer": "Z"}, {"choices": None}, {"question": None}], ids=["index", "letter", "choices", "question"]
)
def test_an_item_of_another_shape_is_named(tmp_path: Path, fault: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="m3cot/train/0"):
        list(Corpus("m3cot", written(tmp_path, [shown({**M3COT, **fault})])).problems("train"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("train.jsonl", b"[1, 2]\n", "line 1 of .* is no JSON object"),
        ("train.jsonl", b'{"question": "caf\xe9"}\n', "is no JSON in UTF-8"),
        ("train.parquet", b"no table", "cannot be read as Parquet"),
    ],
    ids=["list", "latin", "parquet"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=told):
        list(Corpus("m3cot", tmp_path).problems("train"))


def test_a_missing_rationale_is_no_step_that_says_none(tmp_path: Path) -> None:
    (problem,) = Corpus("m3cot", written(tmp_path, [shown({**M3COT, "rationale": None})])).problems("train")
    assert problem.extra["steps"] == []


def test_a_folder_without_the_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"validation\*\.jsonl"):
        list(Corpus("m3cot", written(tmp_path, [])).problems("validation"))


def test_a_problem_with_nothing_to_internalise_is_refused(tmp_path: Path) -> None:
    (problem,) = Corpus("scienceqa", written(tmp_path, [shown({**SCIENCE, "lecture": "", "solution": ""})])).problems("train")
    with pytest.raises(RationaleError, match="neither an oracle"):
        of_problem(problem)
