"""What was sampled is reproduced by the trainer's own pass over merged rows; every way to lose it is refused by name and span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageOps
from torch import Tensor

from monologue.agents.load import load_policy
from monologue.backends.base import Sampling
from monologue.graphs.play import play
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from monologue.training.collate import Collate
from monologue.training.experience import over
from monologue.training.gate import GateError, Guards, gate
from monologue.training.policies import Learner, Policies
from monologue.training.rows import Row, read_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate") / "run"
    hot = Sampling(temperature=1.5, max_tokens=16)
    seats = {role: load_policy(starter(role), role, sampling=hot, policy_id=role) for role in ("questioner", "answerer")}
    play("monologue", Shapes().problems("validation", 10), seats, folder, progress=False, max_turns=5)
    return folder


def recomputed(run: Path, role: str, rows: Sequence[Row], picture: Any = None) -> tuple[list[Tensor], str]:
    learner = Learner.open(str(starter(role)))
    policies = Policies({role: learner})
    collate = Collate(learner.inputs, picture or RunReader(run).picture)
    (found,) = over(rows, collate, lambda batch: (policies(role, batch)[0].logprobs,), 4)
    return found, learner.checkpoint.version


@pytest.mark.parametrize("role", ["questioner", "answerer"])
def test_the_trainers_pass_over_merged_rows_gives_what_was_recorded(run: Path, role: str) -> None:
    rows = list(read_rows(run, [role]))
    found, version = recomputed(run, role, rows)
    compared, mean = gate(rows, found, version)
    assert compared == sum(sum(row.mask) for row in rows) and 0 < mean < 1e-5
    assert gate(rows, found, "v9") == (0, 0.0), "other weights' ids prove nothing"


def changed(row: Row, logprobs: tuple[float, ...] | None) -> Row:
    """The row with other log-probs in its first call of at least three ids."""
    place = next(i for i, piece in enumerate(row.pieces) if piece.stop - piece.start > 2)
    pieces = list(row.pieces)
    pieces[place] = replace(pieces[place], logprobs=logprobs)
    return replace(row, pieces=tuple(pieces))


def test_every_loss_is_refused_and_named(run: Path) -> None:
    rows = list(read_rows(run, ["questioner"]))
    found, version = recomputed(run, "questioner", rows)
    piece = next(piece for piece in rows[3].pieces if piece.stop - piece.start > 2)
    assert piece.logprobs is not None
    for logprobs, word in (
        ((*piece.logprobs[1:], -5.0), "off by one"),
        ((-7.0, *piece.logprobs[:-1]), "off by one"),
        (tuple(value - 0.01 for value in piece.logprobs), "0.01 nats"),
        ((float("nan"), *piece.logprobs[1:]), "inf nats"),
        (None, "no ratio can be formed"),
    ):
        with pytest.raises(GateError, match=f"span {piece.span_id}.*{word}"):
            gate([*rows[:3], changed(rows[3], logprobs), *rows[4:]], found, version)
    assert gate(rows, found, version)[0] > 0


def test_another_picture_is_refused(run: Path) -> None:
    rows = list(read_rows(run, ["answerer"]))
    reader = RunReader(run)
    found, version = recomputed(run, "answerer", rows, lambda sha256: ImageOps.invert(reader.picture(sha256)).rotate(180))
    with pytest.raises(GateError, match="weights, pictures, ids or sampling"):
        gate(rows, found, version)


def test_guards_fire_one_by_one_and_say_what_was_seen() -> None:
    sound = {"drift": 1e-7, "effective": 1.0, "masked": 0.0, "entropy": 1.2, "reward": 0.5}
    guards, past = Guards(window=4), [{**sound, "entropy": 2.6 - 0.1 * step} for step in range(6)]
    guards.check(past, sound)
    for name, value in (("drift", 0.03), ("effective", 0.2), ("masked", 0.4), ("entropy", 1.1)):
        with pytest.raises(GateError, match=f"guard '{name}' fired"):
            guards.check(past, sound | {name: value})
        Guards(window=4, **{name: None}).check(past, sound | {name: value})
    guards.check(past, sound | {"entropy": 1.1, "reward": 0.6})  # whoever learns becomes sure
    guards.check(past[:4], sound | {"entropy": 0.1})  # too early to tell
    certain = [{**sound, "entropy": 0.04}] * 6
    guards.check(certain, sound | {"entropy": 0.001})  # nothing was left to lose


def test_log_probs_are_scored_without_dropout_whatever_the_loop_wants(run: Path) -> None:
    learner = Learner.open(str(starter("questioner")))
    policies = Policies({"questioner": learner})
    policies.train()
    assert not any(module.training for module in policies.modules()) and torch.is_grad_enabled()


def test_a_stray_id_of_rounding_passes_and_a_small_fault_everywhere_does_not(run: Path) -> None:
    """Rounding has a long tail and a tiny mean; a fault, however small, has a mean."""
    rows = list(read_rows(run, ["questioner"]))
    found, version = recomputed(run, "questioner", rows)
    stray = [one.clone() for one in found]
    stray[2][0] += 3e-4
    assert gate(rows, stray, version)[0] == sum(sum(row.mask) for row in rows)
    stray[2][0] += 1e-3
    with pytest.raises(GateError, match=r"0\.0013 nats"):
        gate(rows, stray, version)
    with pytest.raises(GateError, match="in the mean"):
        gate(rows, [one + 1.5e-4 for one in found], version)
