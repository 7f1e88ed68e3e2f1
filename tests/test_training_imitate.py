"""Stage one learns what was said and nothing else; the step is the same however it is cut; the examples run as they stand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from monologue import imitate, load_policy, play, solved, starter
from monologue.backends.base import Sampling
from monologue.cli import main
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from monologue.training.rationales import of_run
from monologue.training.rows import RowError
from monologue.training.starter.models import build_answerer, build_image_processor, build_questioner, build_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("imitate") / "run"
    words = ["play", "--questioner", "oracle", "--answerer", "oracle", "--split", "train", "--n", "24", "--families", "attribute,near"]
    assert main([*words, "--out", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained policies."""
    found = {}
    for role, build in (("questioner", build_questioner), ("answerer", build_answerer)):
        found[role] = tmp_path_factory.mktemp(role)
        build(3, build_tokenizer()).save_pretrained(found[role])
        build_tokenizer().save_pretrained(found[role])
    build_image_processor().save_pretrained(found["answerer"])
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def largest_gap(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_an_untrained_questioner_learns_to_speak_the_oracles_language(oracle: Path, fresh: dict[str, Path], tmp_path: Path) -> None:
    report = imitate(oracle, fresh["questioner"], tmp_path / "q", role="questioner", steps=60, lr=3e-3)
    losses = [point["loss"] for point in report["curve"]]
    assert report["rows"] == 24 and losses[-1] < 0.25 * losses[0]
    assert json.loads((tmp_path / "q" / "imitate.json").read_text()) == report
    seats = {
        "questioner": load_policy(tmp_path / "q", "questioner", sampling=Sampling(temperature=0)),
        "answerer": load_policy(starter("answerer"), "answerer"),
    }
    summary = play("monologue", Shapes(["attribute", "near"]).problems("train", 8), seats, tmp_path / "run", progress=False)
    assert summary.ok == 8 and sum(episode.turns for episode in summary.episodes) > 8, "it asks"
    assert not list((tmp_path / "q").glob("*.bin")), "nothing pickled"


def test_accumulated_batches_take_the_step_of_one_large_batch(oracle: Path, fresh: dict[str, Path], tmp_path: Path) -> None:
    for name, batch, accumulated in (("whole", 8, 1), ("quarters", 2, 4)):
        settings = {"role": "answerer", "steps": 3, "batch": batch, "gradient_accumulation_steps": accumulated, "dtype": "float64"}
        imitate(oracle, fresh["answerer"], tmp_path / name, **settings)  # type: ignore[arg-type]
    assert largest_gap(tmp_path / "whole", tmp_path / "quarters") < 1e-9
    assert largest_gap(tmp_path / "whole", fresh["answerer"]) > 1e-4


def test_the_same_seed_gives_the_same_weights_and_another_another(oracle: Path, fresh: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        imitate(oracle, fresh["questioner"], tmp_path / name, role="questioner", steps=3, batch=4, seed=seed)
    assert largest_gap(tmp_path / "a", tmp_path / "b") == 0 < largest_gap(tmp_path / "a", tmp_path / "c")


def test_the_order_in_which_episodes_ended_changes_no_weight(oracle: Path, fresh: dict[str, Path], tmp_path: Path) -> None:
    """Episodes are played at once, and no seed decides which of them ends first."""
    shutil.copytree(oracle, tmp_path / "run")
    (file,) = (tmp_path / "run" / "spans").glob("*.jsonl")
    by_episode: dict[str, list[str]] = defaultdict(list)
    for line in file.read_text().splitlines():
        by_episode[json.loads(line)["episode_id"]].append(line)
    file.write_text("".join(f"{line}\n" for lines in reversed(by_episode.values()) for line in lines))
    assert [one.start.episode_id for one in RunReader(tmp_path / "run").episodes()] == list(reversed(by_episode))
    for name, run in (("one", oracle), ("other", tmp_path / "run")):
        imitate(run, fresh["questioner"], tmp_path / name, role="questioner", steps=4, batch=8)
    assert largest_gap(tmp_path / "one", tmp_path / "other") == 0
    told = [[rationale.id for rationale in of_run(RunReader(run))] for run in (oracle, tmp_path / "run")]
    assert told[0] == told[1] and len(told[0]) == len(by_episode)


def test_what_cannot_be_imitated_says_why(oracle: Path, fresh: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RowError, match="nothing of the role 'critic'"):
        imitate(oracle, fresh["questioner"], tmp_path / "q", role="critic", steps=1)
    with pytest.raises(RowError, match="nothing of the role"):
        imitate(oracle, fresh["questioner"], tmp_path / "q", role="questioner", steps=1, keep=lambda row: not solved(row))
    scripted = tmp_path / "scripted"
    assert main(["play", "--backend", "scripted", "--n", "2", "--out", str(scripted)]) == 0
    with pytest.raises(RowError, match="tokenizer"):
        imitate(scripted, fresh["questioner"], tmp_path / "q", role="questioner", steps=1)


def test_the_command_trains_from_a_recipe(oracle: Path, fresh: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "imitate", "imitate", "--start", str(fresh["questioner"]), "--out", str(tmp_path / "q")]
    assert main([*words, "--set", f'run="{oracle}"', "--set", "steps=2"]) == 0
    assert "24 rows" in capsys.readouterr().out and (tmp_path / "q" / "model.safetensors").is_file()
    for setting, word in (("steps=0", "greater than or equal to 1"), ("role=x", "text wants quotes"), ("speed=1", "KEY=VALUE")):
        assert main([*words, "--set", setting]) == 2
        assert word in capsys.readouterr().err
    assert main([*words, "--set", 'run="/nowhere"']) == 2


@pytest.mark.parametrize("example", ["vote", "sum", "fallback"])
def test_examples_define_trace_verify_and_train_in_under_sixty_lines(example: str, tmp_path: Path) -> None:
    file = ROOT / "examples" / f"{example}.py"
    assert len(file.read_text().splitlines()) < 60
    command = [sys.executable, "-W", "error", str(file), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "trace verified: True" in done.stdout and "imitated" in done.stdout and "accuracy 0.0" not in done.stdout
