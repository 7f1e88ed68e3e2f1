"""A run as a data set: exact, lazy, and never stale."""

from __future__ import annotations

import array
from pathlib import Path

import pytest

from monologue.cli import main
from monologue.training.dataset import as_dataset
from monologue.training.rows import read_rows

datasets = pytest.importorskip("datasets", reason="the extra [datasets]")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    assert main(["play", "--backend", "scripted", "--n", "4", "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_every_row_is_there_bit_for_bit(run: Path, tmp_path: Path) -> None:
    rows = list(read_rows(run))
    found = as_dataset(run, cache_dir=tmp_path / "cache")
    assert len(found) == len(rows) == 8
    for row, example in zip(rows, found, strict=True):
        assert tuple(example["ids"]) == row.ids and bytes(example["mask"]) == row.mask
        assert array.array("f", example["logprobs"]) == array.array("f", row.logprobs or ())
        assert dict(zip(example["reward_names"], example["reward_values"], strict=True)) == {"exact_match": 1.0}
        assert [picture.size for picture in example["images"]] == [(84, 84)] * len(row.images)


def test_pictures_are_opened_only_when_they_are_looked_at(run: Path, tmp_path: Path) -> None:
    found = as_dataset(run, roles=["answerer"], cache_dir=tmp_path / "cache")
    for file in (run / "images").iterdir():
        file.unlink()
    assert found.select_columns(["ids"])[0]["ids"]
    with pytest.raises(FileNotFoundError):
        found[0]["images"]


def test_a_run_that_has_grown_is_read_anew(run: Path, tmp_path: Path) -> None:
    assert len(as_dataset(run, roles=["questioner"], cache_dir=tmp_path / "cache")) == 4
    assert main(["play", "--backend", "scripted", "--n", "6", "--out", str(run)]) == 0
    assert len(as_dataset(run, roles=["questioner"], cache_dir=tmp_path / "cache")) == 6
