"""TRL, verl and verifiers read what we export, by their own loaders, and get what the run holds; their losses are ours.

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
import torch
from torch import Tensor

from monologue.cli import main
from monologue.seating import starter
from monologue.training import losses
from monologue.training.exports.trl import to_trl
from monologue.training.exports.verifiers import to_verifiers
from monologue.training.exports.verl import to_verl
from monologue.training.objectives import Ppo
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


# Losses and advantages on the same random tensors, gradients too, to 1e-6 in float64.

B, T = 8, 13
LOW, HIGH, CAP = 0.2, 0.28, 2.0
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
DIVERGENCES = [0.0, 5.5, 6.0, 7.0, 60.0]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module", params=range(3))
def tables(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(request.param)
    draw = lambda *shape: torch.randn(*shape, generator=dice, dtype=torch.float64)  # noqa: E731
    mask = (torch.rand(B, T, generator=dice) < 0.7).double()
    mask[:, 0] = 1
    old = -draw(B, T).abs()
    found = {"mask": mask, "old": old, "new": old + 0.4 * draw(B, T), "behaviour": old + 0.2 + 0.5 * draw(B, T)}
    found |= {"reference": old + 0.3 * draw(B, T), "advantage": draw(B, 1).expand(B, T).contiguous(), "reward": draw(B, T) * mask}
    return found | {"value": draw(B, T), "value_now": draw(B, T)}


def asked(tables: dict[str, Tensor], file: Path, **facts: Any) -> Path:
    plain = {"tables": {name: values.tolist() for name, values in tables.items()}, "low": LOW, "high": HIGH, "cap": CAP, **facts}
    file.write_text(json.dumps(plain))
    return file


def flat(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = tables["mask"] > 0
    return {name: values[kept] for name, values in tables.items()} | {"unit": torch.arange(B).unsqueeze(1).expand(B, T)[kept]}


def table(values: Tensor, tables: dict[str, Tensor]) -> Tensor:
    found = torch.zeros(B, T, dtype=torch.float64)
    found[tables["mask"] > 0] = values
    return found


def test_grpo_with_stale_logs_and_kl_is_trls(tables: dict[str, Tensor], tmp_path: Path) -> None:
    """TRL looks for drift from the present weights, we from those when the update began; at its beginning they are the same."""
    begun = {**tables, "new": tables["old"]}
    theirs = load("trl", "trl_loss.py", asked(begun, tmp_path / "t.json", kl=0.04, delta=0.1))
    f = flat(begun)
    new = f["new"].clone().requires_grad_(True)
    kept = losses.stale_mask(f["old"], f["behaviour"], f["advantage"], f["mask"], f["unit"], 0.1)
    assert 0 < kept.mean() < 1
    weights, count = f["advantage"] * losses.importance(f["old"], f["behaviour"], CAP) * kept, float(begun["mask"].sum())
    loss = losses.surrogate(new, f["old"], weights, count, low=LOW, high=HIGH, dual=None)
    loss = loss + 0.04 * losses.kl_estimate(new, f["reference"]).sum() / count
    loss.backward()
    assert new.grad is not None and loss.item() == pytest.approx(theirs["loss"], abs=1e-6)
    torch.testing.assert_close(table(new.grad, begun), torch.tensor(theirs["gradient"], dtype=torch.float64), **CLOSE)


def test_the_clipped_surrogate_is_trls(tables: dict[str, Tensor], tmp_path: Path) -> None:
    theirs = load("trl", "trl_loss.py", asked(tables, tmp_path / "t.json", kl=0.0, delta=None))
    f = flat(tables)
    new = f["new"].clone().requires_grad_(True)
    weights = f["advantage"] * losses.importance(f["old"], f["behaviour"], CAP)
    loss = losses.surrogate(new, f["old"], weights, float(tables["mask"].sum()), low=LOW, high=HIGH, dual=None)
    loss.backward()
    assert new.grad is not None and loss.item() == pytest.approx(theirs["loss"], abs=1e-6)
    torch.testing.assert_close(table(new.grad, tables), torch.tensor(theirs["gradient"], dtype=torch.float64), **CLOSE)


def test_surrogate_critic_gae_rloo_weights_and_controller_are_verls(tables: dict[str, Tensor], tmp_path: Path) -> None:
    theirs = load("verl", "verl_loss.py", asked(tables, tmp_path / "t.json", groups=GROUPS, divergences=DIVERGENCES))
    f, count = flat(tables), float(tables["mask"].sum())

    def same(ours: Tensor, name: str) -> None:
        torch.testing.assert_close(table(ours, tables), torch.tensor(theirs[name], dtype=torch.float64) * tables["mask"], **CLOSE)

    new, now = f["new"].clone().requires_grad_(True), f["value_now"].clone().requires_grad_(True)
    policy = losses.surrogate(new, f["old"], f["advantage"], count, low=LOW, high=HIGH, dual=3.0)
    critic = losses.value_loss(now, f["value"], f["reward"], f["mask"], count, 0.2)
    torch.autograd.backward([policy, critic])
    assert new.grad is not None and now.grad is not None
    assert (policy.item(), critic.item()) == (pytest.approx(theirs["policy"], abs=1e-6), pytest.approx(theirs["critic"], abs=1e-6))
    same(new.grad, "gradient")
    same(now.grad, "critic gradient")
    advantages = losses.gae(f["reward"], f["value"], f["unit"], 0.97, 0.9)
    same(losses.whiten(advantages, f["mask"]), "advantages")
    same(advantages + f["value"], "returns")
    same(losses.kl_estimate(f["new"], f["reference"]), "k3")
    weights = losses.importance(f["old"], f["behaviour"], CAP)
    same(weights, "weights")
    assert losses.effective_share(weights) == pytest.approx(theirs["effective"], abs=1e-5)
    scores = tables["reward"].sum(1)
    others = torch.stack([(scores[group].sum() - scores[group]) / 3 for group in (slice(0, 4), slice(4, 8))]).flatten()
    same((scores - others).unsqueeze(1).expand(B, T)[tables["mask"] > 0], "alone")
    price, objective = 0.2, Ppo(kl=0.2, target=6.0, horizon=10_000)
    for divergence, expected in zip(DIVERGENCES, theirs["prices"], strict=True):
        price = objective.adapted(price, divergence, 64)
        assert price == pytest.approx(expected, abs=1e-9)
