"""Stage one, begun for long: a killed imitation goes on bit for bit and nowhere else; fewer weights, fewer bits, more processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from monologue import imitate, solved, starter
from monologue.cli import main
from monologue.traces.images import PictureError
from monologue.training.claims import latest
from monologue.training.imitate import fingerprint
from monologue.training.imitation import Imitation
from monologue.training.recipe import RecipeError
from monologue.training.rows import read_rows

ROOT = Path(__file__).parent.parent
SMALL: dict[str, Any] = {"role": "questioner", "steps": 3, "batch": 8, "lr": 1e-3}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played(tmp_path_factory.mktemp("imitate") / "run", "--n", "20")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def played(run: Path, *more: str) -> Path:
    words = ["play", "--questioner", "oracle", "--answerer", "oracle", "--split", "train", "--families", "attribute,near"]
    assert main([*words, *more, "--out", str(run)]) == 0
    return run


def command(run: Path, out: Path, *more: str, launcher: tuple[str, ...] = (), **own: Any) -> list[str]:
    words = [sys.executable, "-W", "error", *launcher, "-m", "monologue", "train", "imitate", "imitate", "--out", str(out), *more]
    for key, value in {"run": str(run), **own}.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    return words


def surroundings() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {"env": environment, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def curve(out: Path) -> list[Any]:
    return list(json.loads((out / "imitate.json").read_text())["curve"])


def reached(folder: Path) -> int:
    """The step of the last whole checkpoint."""
    found = latest(folder)
    return 0 if found is None else int(found.name.partition("-")[2])


def gap(one: Path, other: Path) -> float:
    """Largest difference of any weight."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def test_an_imitation_killed_by_the_system_goes_on_with_the_same_losses_to_the_last_bit(oracle: Path, tmp_path: Path) -> None:
    """Points of the curve are two steps apart, checkpoints are asked for every third: none falls between two points."""
    own = {"steps": 50, "batch": 4, "accumulation": 2, "save_every": 3, "lr": 1e-3}
    whole = subprocess.run(command(oracle, tmp_path / "whole", **own), **surroundings())
    assert whole.returncode == 0, whole.stderr.decode()
    killed = subprocess.Popen(command(oracle, tmp_path / "killed", **own), **surroundings())
    left = tmp_path / "killed" / "trainer"
    while killed.poll() is None and reached(left) < 12:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was killed, it did not end"
    killed.communicate()
    checkpoint = latest(left)
    assert checkpoint is not None and 12 <= reached(left) < 50 and not (tmp_path / "killed" / "imitate.json").exists()
    before = (checkpoint / "optimizer.pt").stat().st_mtime_ns
    shutil.copytree(checkpoint, tmp_path / "before")
    again = subprocess.run([*command(oracle, tmp_path / "killed", **own), "--resume"], **surroundings())
    assert again.returncode == 0, again.stderr.decode()
    assert not checkpoint.exists() or (checkpoint / "optimizer.pt").stat().st_mtime_ns == before, "it went on from there"
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 25
    assert gap(tmp_path / "killed", tmp_path / "whole") == 0.0 < gap(tmp_path / "before", tmp_path / "whole")


def test_a_resume_takes_up_the_checkpoint_and_with_adapters_the_small_matrices(oracle: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="an extra: pip install 'monologue[lora]'")
    for name, more in (("all", {}), ("lora", {"lora": {"rank": 4, "alpha": 8}})):
        out, own = tmp_path / name, {**SMALL, "steps": 8, "save_every": 3, **more}
        first = imitate(oracle, starter("questioner"), out, **own)
        assert gap(out, starter("questioner")) > 1e-4, "the result is whole, under the names that the start has"
        assert first["curve"][0]["loss"] != first["curve"][-1]["loss"]
        shutil.copytree(out, tmp_path / "before" / name)
        assert imitate(oracle, starter("questioner"), out, **own, resume=True) == first, "nothing is left to do"
        assert gap(out, tmp_path / "before" / name) == 0.0, "nor was a step more taken"
        shutil.rmtree(out / "trainer" / "checkpoint-8")
        assert (out / "trainer" / "checkpoint-6" / "adapter.safetensors").is_file() == (name == "lora")
        assert imitate(oracle, starter("questioner"), out, **own, resume=True) == first
        assert gap(out, tmp_path / "before" / name) == 0.0
        shutil.rmtree(out / "trainer")
        assert imitate(oracle, starter("questioner"), out, **own, resume=True) == first, "from the beginning"


def test_adapters_move_the_layers_that_they_stand_at_and_no_other(oracle: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="an extra: pip install 'monologue[lora]'")
    imitate(oracle, starter("questioner"), tmp_path, **SMALL, lora={"rank": 4, "targets": ["q_proj"]})
    before, after = (load_file(folder / "model.safetensors") for folder in (starter("questioner"), tmp_path))
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert moved and all("q_proj" in name for name in moved)


def test_another_recipe_another_start_and_other_rows_are_refused_at_a_resume(
    oracle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(oracle, tmp_path / "moved")
    run = {"role": "questioner", **SMALL}
    with pytest.raises(RecipeError, match="leave --resume out"):
        imitate(oracle, starter("questioner"), out, **run, resume=True)
    imitate(oracle, starter("questioner"), out, **run)
    imitate(oracle, starter("questioner"), other, **{**run, "seed": 1})
    for change, told in (({"lr": 1e-2}, "'lr'"), ({"steps": 4}, "'steps'"), ({"lora": {"rank": 4}}, "'lora'"), ({"batch": 4}, "'batch'")):
        with pytest.raises(RecipeError, match=f"has another recipe: .*{told}"):
            imitate(oracle, starter("questioner"), out, **{**run, **change}, resume=True)
    with pytest.raises(RecipeError, match="'start'"):
        imitate(oracle, other, out, **run, resume=True)
    with pytest.raises(RecipeError, match="'rows'"):
        imitate(played(tmp_path / "run", "--n", "3"), starter("questioner"), out, **run, resume=True)
    with pytest.raises(RecipeError, match="'rows'"):
        kept = {"keep": lambda row: row.sample_index == 0 and row.episode_id != next(read_rows(oracle)).episode_id}
        imitate(oracle, starter("questioner"), out, **run, **kept, resume=True)
    free = {"save_every": 1, "keep": solved}  # of an oracle's run all are
    assert imitate(tmp_path / "moved", starter("questioner"), out, **run, **free, resume=True)["curve"] == curve(out), "a run may move"
    words = ["train", "imitate", "imitate", "--out", str(out), "--set", f'run="{oracle}"', "--resume"]
    assert main(words) == 2 and "has another recipe" in capsys.readouterr().err
    assert main(["train", "starter", "questioner", "--resume"]) == 2 and "got it with 'starter'" in capsys.readouterr().err


def test_a_fingerprint_tells_rows_apart_by_all_that_a_step_sees(oracle: Path) -> None:
    rows = list(read_rows(oracle, roles=["questioner"]))
    assert fingerprint(rows) == fingerprint(read_rows(oracle, roles=["questioner"]))
    assert len({fingerprint(some) for some in (rows, rows[1:], rows[::-1], list(read_rows(oracle)))}) == 4


def test_a_folder_with_other_work_in_it_is_refused_and_stays_as_it_was(oracle: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(starter("answerer"), policy)
    shutil.copytree(oracle, tmp_path / "run")
    (tmp_path / "latent").mkdir()
    (tmp_path / "latent" / "recipe.json").write_text('{"policy": "latent"}')
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for name, told in (("policy", "holds a policy"), ("run", "holds a run of traces"), ("latent", "holds a training already")):
        for words in ([], ["--retokenize"]):
            train = ["train", "imitate", "imitate", "--out", str(tmp_path / name), "--set", f'run="{oracle}"', *words]
            assert main(train) == 2
        with pytest.raises(RecipeError, match=f"{name}'.*{told}.*name another --out"):
            imitate(oracle, starter("questioner"), tmp_path / name, **SMALL)
    with pytest.raises(RecipeError, match="'policy'"):
        imitate(oracle, starter("questioner"), tmp_path / "latent", **SMALL, resume=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_imitation_that_failed_before_its_first_checkpoint_leaves_the_folder_to_the_mended_one(oracle: Path, tmp_path: Path) -> None:
    small, run, out = {**SMALL, "role": "answerer"}, shutil.copytree(oracle, tmp_path / "run"), tmp_path / "out"
    shutil.rmtree(run / "images")
    with pytest.raises(PictureError):
        imitate(run, starter("answerer"), out, **small)
    assert not out.exists()
    imitate(oracle, starter("answerer"), out, **small)
    for left in (out / "trainer").iterdir():
        shutil.rmtree(left)
    with pytest.raises(PictureError):
        imitate(run, starter("answerer"), out, **small, resume=True)
    assert {"recipe.json", "model.safetensors"} <= {file.name for file in out.iterdir()}, "a resumed one keeps its claim"


def test_micro_batches_change_no_step_and_have_to_fill_it(oracle: Path, tmp_path: Path) -> None:
    for name, parts in (("one", 1), ("four", 4)):
        imitate(oracle, starter("questioner"), tmp_path / name, **SMALL, accumulation=parts, dtype="float64")
    assert gap(tmp_path / "one", tmp_path / "four") < 1e-9 < 1e-5 < gap(tmp_path / "one", starter("questioner"))
    with pytest.raises(RecipeError, match="accumulation=3 equal"):
        imitate(oracle, starter("questioner"), tmp_path / "three", **SMALL, accumulation=3)


def test_two_processes_take_the_steps_of_one_and_one_of_them_writes(oracle: Path, tmp_path: Path) -> None:
    own = {"steps": 4, "batch": 10, "dtype": "float64", "lr": 1e-3, "save_every": 2}
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = subprocess.run(command(oracle, tmp_path / "two", launcher=launch, **own), **surroundings())
    assert done.returncode == 0, done.stderr.decode()
    imitate(oracle, starter("questioner"), tmp_path / "one", role="questioner", **own)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-9)
    assert gap(tmp_path / "one", tmp_path / "two") < 1e-9 < 1e-5 < gap(tmp_path / "one", starter("questioner"))
    shutil.copytree(tmp_path / "two", tmp_path / "before")
    shutil.rmtree(tmp_path / "two" / "trainer" / "checkpoint-4")
    done = subprocess.run([*command(oracle, tmp_path / "two", launcher=launch, **own), "--resume"], **surroundings())
    assert done.returncode == 0, done.stderr.decode()
    assert curve(tmp_path / "two") == curve(tmp_path / "before") and gap(tmp_path / "two", tmp_path / "before") == 0.0


def test_numbers_are_those_that_the_recipe_asks_for(oracle: Path, tmp_path: Path) -> None:
    asked = {"plain": {}, "mixed": {"mixed": "bfloat16"}, "half": {"dtype": "bfloat16", "lr": 1e-2}}
    first = {}
    for name, own in asked.items():
        first[name] = imitate(oracle, starter("answerer"), tmp_path / name, **{**SMALL, "role": "answerer", **own})["curve"][0]["loss"]
    dtypes = {name: {str(value.dtype) for value in load_file(tmp_path / name / "model.safetensors").values()} for name in asked}
    assert dtypes == {"plain": {"torch.float32"}, "mixed": {"torch.float32"}, "half": {"torch.bfloat16"}}
    assert len(set(first.values())) == 3 and gap(tmp_path / "mixed", starter("answerer")) > 1e-4


def test_a_tracker_is_told_every_point_of_the_curve(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    report = imitate(oracle, starter("questioner"), tmp_path / "out", **SMALL, report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    told = {event.step: event.value for event in board.Scalars("train/loss")}
    assert told == pytest.approx({point["step"]: point["loss"] for point in report["curve"]}, rel=1e-6) and len(told) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mixed": "bfloat16", "dtype": "bfloat16"}, "wants dtype='float32', got dtype='bfloat16'"),
        ({"dtype": "float16"}, "dtype: .*got 'float16'"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"save_every": 0}, "save_every"),
        ({"batch": 6, "accumulation": 4}, "accumulation=4"),
        ({"shard": True}, "shard: Extra inputs"),
    ],
)
def test_a_recipe_of_imitation_refuses_what_cannot_be_honoured(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Imitation.read({"run": "runs/oracle", "role": "questioner", **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_device_that_is_not_there_is_refused(oracle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="'cpu', got device='cuda'"):
        imitate(oracle, starter("questioner"), tmp_path / "out", **SMALL, device="cuda")
    with pytest.raises(RecipeError, match="got device='quantum'"):
        imitate(oracle, starter("questioner"), tmp_path / "out", **SMALL, device="quantum")
    for device in ("cuda", "quantum"):
        assert main(["train", "reinforce", "reinforce", "--set", f'device="{device}"', "--out", str(tmp_path / "out")]) == 2
        assert f"expected a device that this machine has, such as 'cpu', got device='{device}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tracker", "told"), [("tensorbored", "got 'tensorbored'"), ("swanlab", "'swanlab' of report_to is not installed here")]
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(
    oracle: Path, tmp_path: Path, tracker: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["imitate", "imitate", "--set", f'run="{oracle}"'], ["reinforce", "reinforce"]):
        assert main(["train", *words, "--set", f'report_to=["{tracker}"]', "--out", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
