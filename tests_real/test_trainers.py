"""TRL, verl and verifiers read what we export, by their own loaders, and get what the run holds.

Each loader runs in the environment that ``tests_real/install_trainers.sh`` makes, in a process that knows nothing of monologue. A tool
that could not be installed skips its test with the reason that the script kept; a tool that is simply not there fails it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from monologue.cli import main
from monologue.seating import starter
from monologue.training.exports.trl import to_trl
from monologue.training.exports.verifiers import to_verifiers
from monologue.training.exports.verl import to_verl
from monologue.training.rows import Row, read_rows

HERE = Path(__file__).parent
VENV = Path(os.environ.get("TRAINERS_VENV", HERE.parent / ".venv-trainers")).absolute()


def load(tool: str, loader: str, *arguments: object, needs: str | None = None) -> Any:
    """What a loader prints last, as JSON."""
    for name in (tool, needs):
        reason = VENV / "missing" / (name or "")
        if name and reason.is_file():
            pytest.skip(f"{name} could not be installed: {reason.read_text().strip().splitlines()[-1]}")
    if not (VENV / "done").is_file():
        pytest.fail(f"no trainers in {VENV}; sh tests_real/install_trainers.sh {VENV} installs them")
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    known |= {"PYTHONPATH": str(VENV / "verl")} if tool == "verl" else {}
    known |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(VENV / "bin" / "python"), str(HERE / "loaders" / loader), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=known, cwd="/", timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policies, sampled so hotly that they also err."""
    folder = tmp_path_factory.mktemp("trainers") / "run"
    assert main(["play", "--n", "12", "--samples", "2", "--temperature", "1.5", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seat that sees the problem."""
    folder = tmp_path_factory.mktemp("trainers") / "direct"
    assert main(["play", "--graph", "direct", "--backend", "scripted", "--n", "4", "--out", str(folder)]) == 0
    return folder


def labels(row: Row) -> list[int]:
    return [number if free else -100 for number, free in zip(row.ids, row.mask, strict=True)]


def test_trl_takes_a_step_on_our_ids_and_its_labels_are_our_mask(run: Path, tmp_path: Path) -> None:
    to_trl(run, tmp_path, ["questioner"], keep="all")
    found = load("trl", "with_trl.py", tmp_path / "questioner.parquet", starter("questioner"), tmp_path / "scratch")
    rows = list(read_rows(run, ["questioner"]))
    assert len(rows) == 24 and [one["input_ids"] for one in found["rows"]] == [list(row.ids) for row in rows]
    assert [one["labels"] for one in found["rows"]] == [labels(row) for row in rows]
    assert found["steps"] == 1 and found["losses"][0] > 0 and found["moved"] == found["weights"]


def test_trl_takes_a_step_on_messages_with_pictures(run: Path, tmp_path: Path) -> None:
    to_trl(run, tmp_path, ["answerer"], shape="messages")
    file = tmp_path / "answerer.retokenised.parquet"
    found = load("trl", "with_trl.py", file, starter("answerer"), tmp_path / "scratch", "--sees")
    solved = [row for row in read_rows(run, ["answerer"]) if row.reward("exact_match") == 1.0]
    assert len(found["rows"]) == len(solved) and found["steps"] == 1 and found["losses"][0] > 0
    for one, row in zip(found["rows"], solved, strict=True):
        assert one["pictures"] == [36 * len(row.images), 1176]  # 6 x 6 patches of 3 x 2 x 14 x 14 a picture
        assert sum(label != -100 for label in one["labels"]) == sum(row.mask)  # here its template says as much as we sampled


def test_verifiers_reads_every_branch_bit_for_bit(run: Path, tmp_path: Path) -> None:
    to_verifiers(run, tmp_path)
    rows = {f"{row.episode_id}/{row.role}/{row.stream}": row for row in read_rows(run)}
    found = load("verifiers", "with_verifiers.py", tmp_path / "traces.jsonl")
    assert len(found) == len(rows) == 48
    for trace in found:
        row = rows[trace["id"]]
        (branch,) = trace["branches"]
        assert tuple(branch["ids"]) == row.ids and bytes(branch["mask"]) == row.mask and tuple(branch["logprobs"]) == row.logprobs
        shown = {
            index for image in row.images for index in range(image.placeholder_start, image.placeholder_start + image.placeholder_count)
        }
        assert [int(index in shown) for index in range(len(row.ids))] == (branch["pictures"] or [0] * len(row.ids))
        assert trace["rewards"] == {"exact_match": [row.reward("exact_match"), 1.0]} and trace["reward"] == row.reward("exact_match")
        assert trace["turns"] == len(row.pieces) and trace["generated"] == sum(row.mask) and branch["trainable"]


def test_verl_loads_problems_as_prompts(run: Path, tmp_path: Path) -> None:
    to_verl(run, tmp_path, ["questioner"])
    found = load("verl", "with_verl.py", "rl", tmp_path / "questioner.rl.parquet", starter("questioner"), tmp_path / "scratch")
    assert [one["index"] for one in found] == list(range(12))
    for one in found:
        facts, reward = one["extra_info"], one["reward_model"]
        assert one["prompt"] == [{"role": "user", "content": f"{facts['question']}\nChoices: {', '.join(facts['choices'])}"}]
        assert reward["style"] == "rule" and reward["ground_truth"] in facts["choices"]


def test_verl_loads_dialogues_and_trains_on_the_replies(run: Path, tmp_path: Path) -> None:
    report = to_verl(run, tmp_path, ["questioner"])
    file = "questioner.sft.retokenised.parquet"
    found = load("verl", "with_verl.py", "sft", tmp_path / file, starter("questioner"), tmp_path / "scratch")
    assert len(found) == report.files[file] > 0
    assert all("answer" in one["trained"] and one["trained"].endswith("<eos>") for one in found)


def test_verl_loads_both_with_pictures(direct: Path, tmp_path: Path) -> None:
    to_verl(direct, tmp_path)
    facts = (starter("answerer"), tmp_path / "scratch", "--sees")
    asked = load("verl", "with_verl.py", "rl", tmp_path / "answerer.rl.parquet", *facts, needs="torchvision")
    assert len(asked) == 4 and all(one["prompt"][-1]["content"][0] == {"type": "image", "image": [84, 84]} for one in asked)
    told = load("verl", "with_verl.py", "sft", tmp_path / "answerer.sft.retokenised.parquet", *facts, needs="torchvision")
    gold = [one["reward_model"]["ground_truth"] for one in asked]
    assert [one["trained"] for one in told] == [f"{answer} <eos>" for answer in gold]
    assert [one["pictures"] for one in told] == [[36, 1176]] * 4
