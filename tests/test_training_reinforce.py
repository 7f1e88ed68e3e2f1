"""The loop: what is played is proven, credited and learned from; however it is cut it takes the same step; killed, it goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from safetensors.torch import load_file, save_file
from transformers import Trainer

from monologue.cli import main
from monologue.rollouts import Rollouts, seated, source_of
from monologue.rollouts import reinforce as reinforced
from monologue.seating import starter
from monologue.tasks.base import Problem
from monologue.tasks.shapes import Shapes
from monologue.traces.page.detail import curves
from monologue.traces.schema import Annotation
from monologue.traces.store import RunError, RunReader, RunWriter
from monologue.traces.verify import verify
from monologue.training.adapters import Lora
from monologue.training.claims import latest
from monologue.training.collate import OUTSIDE, Collate, score
from monologue.training.gate import GateError
from monologue.training.objectives import Grpo
from monologue.training.policies import Learner, Policies
from monologue.training.recipe import RecipeError, read_recipe
from monologue.training.reinforce import reinforce
from monologue.training.reinforcement import Reinforcement
from monologue.training.released import as_released
from monologue.training.replay import Weights
from monologue.training.rows import RowError, read_rows
from monologue.training.sources import Logged

ROOT = Path(__file__).parent.parent
FAMILIES = ("attribute", "near")
SMALL: dict[str, Any] = {
    **{"problems": 3, "samples": 3, "temperature": 2.5, "max_tokens": 16, "max_turns": 4, "iterations": 2, "families": ",".join(FAMILIES)},
    **{"guards": {"entropy": None}, "lr": 1e-3, "rewards": {"questions": -0.05, "tokens": -0.02}},
}


def go(out: Path, *, stage: type[Rollouts] = Rollouts, resume: bool = False, **settings: Any) -> list[dict[str, Any]]:
    recipe = Reinforcement.read({**SMALL, **settings})
    learners = {role: Learner.open(source_of(recipe, role), dtype=recipe.dtype, lora=recipe.lora) for role in recipe.trained}
    return reinforce(recipe, out, learners, stage(recipe, Shapes(FAMILIES), seated(recipe)), resume=resume)


def offline(out: Path, run: Path, **settings: Any) -> list[dict[str, Any]]:
    recipe = Reinforcement.read({"runs": [str(run)], "iterations": 2, "rows": 8, "guards": {"entropy": None}, **settings})
    return reinforce(recipe, out, {role: Learner.open(source_of(recipe, role)) for role in recipe.trained})


def gap(one: Path, other: Path) -> float:
    """Largest difference of any weight."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def test_a_run_holds_episodes_rewards_advantages_curves_and_weights_to_replay(tmp_path: Path) -> None:
    lines = go(tmp_path, passes=2, minibatches=2)
    assert [line["step"] for line in lines] == [0, 1] and lines[0]["kl"] == 0.0 < lines[1]["kl"]
    assert all(len(line["losses"]) == 4 and line["drift"] < 1e-5 and line["compared"] == line["sampled"] for line in lines)
    reader = RunReader(tmp_path)
    assert len(list(reader.episodes())) == 2 * 9 and all(check.ok for check in verify(tmp_path))
    rows = list(read_rows(reader, ["questioner"]))
    for row in rows:
        notes = {note.span_id: note.value for note in row.rewards if note.name == "advantage"}
        assert set(notes) == {piece.span_id for piece in row.pieces} and row.reward("questions") is not None
    start, later = Learner.open(str(starter("questioner"))).checkpoint.version, f"v1.{reader.info['run_id'][:8]}"
    assert {piece.weights_version for row in rows for piece in row.pieces} == {start, later}
    assert {"reward", "entropy", "kl", "loss", "turns", "clipped"} <= {curve["name"] for curve in curves(tmp_path)}
    played, weights = tmp_path / "checkpoints" / "questioner", Weights(tmp_path)
    calls = [call for episode in reader.episodes() for call in episode.calls()]
    assert {weights.source(call) for call in calls if call.weights_version == later} == {str(played / later)}
    assert gap(tmp_path / "questioner", played / later.replace("v1", "v2")) == 0.0 < gap(tmp_path / "questioner", starter("questioner"))


def test_accumulation_and_the_cut_of_rows_change_no_step(tmp_path: Path) -> None:
    """The same first batch, in one piece and in four, takes the same step, for both differentiable forms and with a critic."""
    for name in ("grpo", "ppo", "topr"):
        for pieces in (1, 4):
            go(tmp_path / f"{name}{pieces}", objective={"name": name}, accumulation=pieces, dtype="float64", iterations=1, seed=3)
        assert gap(tmp_path / f"{name}1" / "questioner", tmp_path / f"{name}4" / "questioner") < 1e-9
        assert gap(tmp_path / f"{name}1" / "questioner", starter("questioner")) > 1e-5


def test_roles_move_in_turn_and_only_then(tmp_path: Path) -> None:
    settings = {"trained": ["questioner", "answerer"], "lr": {"questioner": 1e-3, "answerer": 3e-4}, "keep": 9}
    lines = go(tmp_path / "turns", alternate=1, **settings)
    assert "questioner entropy" in lines[0] and "answerer entropy" not in lines[0] and "answerer entropy" in lines[1]
    played = tmp_path / "turns" / "checkpoints"
    assert [path.name[:3] for path in (played / "questioner").iterdir()] == ["v1."]
    assert [path.name[:3] for path in (played / "answerer").iterdir()] == ["v2."]
    lines = go(tmp_path / "both", **settings)
    assert all(f"{role} drift" in line for role in settings["trained"] for line in lines)
    assert all(gap(tmp_path / "both" / role, starter(role)) > 0 for role in settings["trained"])


def test_weights_that_were_not_pushed_are_refused_before_the_next_step(tmp_path: Path) -> None:
    class Forgetful(Rollouts):
        def push(self, role: str, folder: Path, version: str) -> None:
            super().push(role, Path(starter(role)), version)

    with pytest.raises(GateError, match=r"span [0-9a-f]{16}: recorded log-probs differ"):
        go(tmp_path, stage=Forgetful)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_old_runs_are_learned_from_when_their_weights_can_be_replayed(tmp_path: Path) -> None:
    go(tmp_path / "run", keep=9)
    before = sorted((file.name, file.stat().st_size) for file in (tmp_path / "run" / "spans").iterdir())
    for objective in ({"name": "grpo"}, {"name": "topr"}, {"name": "awr"}, {"name": "filter", "least": -9.0}):
        name = objective["name"]
        lines = offline(tmp_path / name, tmp_path / "run", objective=objective)
        assert len(lines) == 2 and gap(tmp_path / name / "questioner", starter("questioner")) > 0
        if name in ("grpo", "topr"):
            assert lines[0]["effective"] < 1.0 and 0 < lines[0]["compared"] < lines[0]["sampled"], "some of it is stale"
    assert before == sorted((file.name, file.stat().st_size) for file in (tmp_path / "run" / "spans").iterdir())
    for folder in (tmp_path / "run" / "checkpoints" / "questioner").iterdir():
        folder.rename(tmp_path / folder.name)
    with pytest.raises(GateError, match=r"no weights for 'questioner@v1\..*proof=0"):
        offline(tmp_path / "gone", tmp_path / "run")
    assert offline(tmp_path / "unproven", tmp_path / "run", proof=0)


def test_an_oracles_run_has_no_log_probs_to_form_ratios_with(tmp_path: Path) -> None:
    assert main(["play", "--questioner", "oracle", "--n", "6", "--families", "near", "--out", str(tmp_path / "oracle")]) == 0
    with pytest.raises(GateError, match="no log-probs"):
        offline(tmp_path / "grpo", tmp_path / "oracle", objective={"name": "topr"})
    assert offline(tmp_path / "awr", tmp_path / "oracle", objective={"name": "filter"})


def test_adapters_move_alone_and_leave_as_whole_weights(tmp_path: Path) -> None:
    """The gate passes on what the engine loaded: adapters added in. A resume takes up the small matrices; the start stays what it was."""
    pytest.importorskip("peft", reason="an extra: pip install 'monologue[lora]'")
    lines = go(tmp_path / "run", lora={"rank": 4, "alpha": 8}, iterations=3, save_every=2, lr=1e-2)
    assert lines[0]["kl"] == 0.0 < lines[1]["kl"] and all(line["compared"] == line["sampled"] for line in lines)
    assert gap(tmp_path / "run" / "questioner", starter("questioner")) > 1e-4
    names = set(load_file(tmp_path / "run" / "questioner" / "model.safetensors"))
    assert names == set(load_file(starter("questioner") / "model.safetensors"))
    shutil.rmtree(tmp_path / "run" / "trainer" / "checkpoint-3")
    again = go(tmp_path / "run", lora={"rank": 4, "alpha": 8}, iterations=3, save_every=2, lr=1e-2, resume=True)
    assert [line["losses"] for line in again] == [line["losses"] for line in lines]


def test_adapters_without_peft_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match="need the library 'peft'"):
        Learner.open(str(starter("questioner")), lora=Lora())


def test_the_released_scripts_view_cannot_pass_the_gate_and_can_be_had_on_purpose(tmp_path: Path) -> None:
    lines = go(tmp_path / "sound", objective={"name": "ppo"}, reference=True)
    flawed = go(tmp_path / "flawed", objective={"name": "ppo"}, compat="released")
    spans = [note for row in read_rows(tmp_path / "sound", ["questioner"]) for note in row.rewards if note.name == "advantage"]
    assert spans and all(note.scope == "token" and note.values and note.source == "objective:ppo" for note in spans)
    assert lines[0]["drift"] < 1e-5 and flawed[0]["drift"] > 0.02 and flawed[0]["sampled"] == lines[0]["sampled"]
    row = max(read_rows(tmp_path / "sound", ["questioner"]), key=lambda row: len(row.pieces))
    bare = as_released(row)
    assert len(row.pieces) > 1 and len(bare.ids) == row.pieces[0].start + sum(row.mask)
    said = [row.ids[piece.start : piece.stop] for piece in row.pieces]
    assert [bare.ids[piece.start : piece.stop] for piece in bare.pieces] == said


def test_immo_as_in_the_paper_runs_for_a_few_seconds(tmp_path: Path) -> None:
    """Caption first, two questions, a conclusion; ppo on exact match alone; the price of KL adapts for whoever's turn it is."""
    recipe = Reinforcement.read({**read_recipe("immo"), "problems": 4, "iterations": 2, "guards": {"entropy": None}})
    learners = {role: Learner.open(source_of(recipe, role)) for role in recipe.trained}
    lines = reinforce(recipe, tmp_path, learners, Rollouts(recipe, Shapes(["near"]), seated(recipe)))
    moved = [name for name in ("questioner", "answerer") for line in lines if f"{name} explained" in line]
    assert moved == ["questioner", "answerer"] and "questioner explained" in lines[0] and "answerer explained" in lines[1]
    assert lines[1]["questioner penalty"] < 0.2 and lines[1]["answerer penalty"] < 0.2, "below 6 nats the price falls"
    for episode in RunReader(tmp_path).episodes():
        assert [call.role[0] for call in episode.calls() if call.action] == ["a", "q", "a", "q", "a", "q"]
        assert next(call.node for call in episode.calls()) == "caption"
        rewards = {(note.name, note.weight) for note in episode.annotations if note.weight and note.name != "advantage"}
        assert rewards == {("exact_match", 1.0)}


def test_a_sample_of_the_batch_is_proven_and_the_rest_taken_as_recorded(tmp_path: Path) -> None:
    """The same steps up to rounding; a wrong number in the sample still ends the run; all stale rows are recomputed."""
    whole, some = (go(tmp_path / str(count), verified=count, reference=False, iterations=3) for count in (0, 4))
    for one, two in zip(whole, some, strict=True):
        assert 0 < two["compared"] < one["compared"] and two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert 0.3 < some[0]["entropy"] / whole[0]["entropy"] < 3

    class Forgetful(Rollouts):
        def push(self, role: str, folder: Path, version: str) -> None:
            super().push(role, Path(starter(role)), version)

    with pytest.raises(GateError, match=r"span [0-9a-f]{16}: recorded log-probs differ"):
        go(tmp_path / "forgetful", stage=Forgetful, verified=4)
    go(tmp_path / "old", keep=9)
    lines = offline(tmp_path / "stale", tmp_path / "old", verified=1, reference=False, rows=18, iterations=1)
    assert lines[0]["effective"] < 1.0 and 0 < lines[0]["compared"] < lines[0]["sampled"] / 2


def test_ids_that_another_nucleus_leaves_out_teach_nothing_and_harm_nothing(tmp_path: Path) -> None:
    """Their log-prob is minus infinity by the weights that are trained, and a difference of two such is no number."""
    logged, wild = tmp_path / "run", {"top_p": 0.9, "temperature": 3.0, "lr": 1e-2, "guards": {"entropy": None}}
    go(logged, iterations=3, keep=9, **wild)
    learner, reader = Learner.open(str(logged / "questioner")), RunReader(logged)
    seen = score(learner.checkpoint.model, Collate(learner.inputs, reader.picture)(list(read_rows(reader, ["questioner"]))))
    assert float((seen.logprobs == OUTSIDE).sum()) > 5, "it does happen here"
    seen.logprobs.sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in learner.trained if one.grad is not None)
    blind = {"entropy": None, "effective": None, "masked": None}
    for name, more in (("grpo", {"kl": 0.01}), ("topr", {}), ("awr", {})):
        settings = {"objective": {"name": name, **more}, "guards": blind, "rows": 99, "passes": 2, "questioner": str(logged / "questioner")}
        lines = offline(tmp_path / name, logged, **settings, **({"proof": 0} if name != "awr" else {}))
        assert all(math.isfinite(line[fact]) for line in lines for fact in ("loss", "kl", "entropy"))
        assert math.isfinite(gap(tmp_path / name / "questioner", logged / "questioner"))
    lines = go(tmp_path / "ppo", iterations=3, objective={"name": "ppo", "kl": 0.2}, **wild)
    assert all(math.isfinite(line[fact]) for line in lines for fact in ("loss", "kl", "penalty"))


def test_no_step_is_taken_on_what_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(self: Grpo, *rest: Any) -> torch.Tensor:
        return surrogate(self, *rest) * math.nan

    surrogate = Grpo.loss
    monkeypatch.setattr(Grpo, "loss", spoilt)
    with pytest.raises(GateError, match="the loss of 'questioner' is nan in iteration 0"):
        go(tmp_path / "run")


def test_a_kill_between_two_rewards_of_an_episode_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"iterations": 1, "rewards": {"asked": -0.05, "well_formed": 0.1}}
    whole, annotate, told = go(tmp_path / "whole", **settings), RunWriter.annotate, []

    def dying(self: RunWriter, record: Annotation) -> None:
        annotate(self, record)
        told.append(record.name)
        if told.count("well_formed") == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunWriter, "annotate", dying)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", **settings)
    monkeypatch.setattr(RunWriter, "annotate", annotate)
    again = go(tmp_path / "killed", resume=True, **settings)
    assert [(line["reward"], line["losses"]) for line in again] == [(line["reward"], line["losses"]) for line in whole]
    assert gap(tmp_path / "killed" / "questioner", tmp_path / "whole" / "questioner") == 0.0


def test_more_steps_than_a_role_has_rows_give_nobody_anothers(tmp_path: Path) -> None:
    both = {"trained": ["questioner", "answerer"], "minibatches": 8, "problems": 1, "samples": 2, "iterations": 1}
    lines = go(tmp_path / "run", **both)
    assert len(lines[0]["losses"]) == 8 and gap(tmp_path / "run" / "questioner", starter("questioner")) > 0


def test_both_roles_of_a_logged_episode_are_learned_from_together(tmp_path: Path) -> None:
    roles = ["questioner", "answerer"]
    go(tmp_path / "run", trained=roles, alternate=1, iterations=3, keep=9)
    lines = offline(tmp_path / "out", tmp_path / "run", trained=roles, iterations=6, rows=4, objective={"name": "awr"})
    assert len(lines) == 6
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(RecipeError, match="which are one; name it once"):
        Logged([str(tmp_path / name) for name in ("run", "copy")], roles, 4, 0)


def test_a_run_goes_on_with_its_own_recipe_alone(tmp_path: Path) -> None:
    go(tmp_path, save_every=1, iterations=1)
    with pytest.raises(RecipeError, match=r"credit is 'turn', was 'team'; lr is 0.005, was 0.001; .*resume it as it was"):
        go(tmp_path, resume=True, credit="turn", lr=5e-3, passes=2)
    assert [line["step"] for line in go(tmp_path, resume=True, iterations=2, save_every=2, keep=3)] == [0, 1]
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=r"a line for each of 2 iterations in .* got 0"):
        go(tmp_path, resume=True, iterations=3)


def test_a_task_with_too_few_problems_is_refused(tmp_path: Path) -> None:
    class Few(Shapes):
        def problems(self, split: str, n: int | None = None, seed: int = 0) -> Iterator[Problem]:
            return islice(super().problems(split, 5, seed), n)

    recipe = Reinforcement.read({**SMALL, "problems": 8})
    with pytest.raises(RecipeError, match="problems=8 an iteration, but the split 'train' of 'shapes' has 5"):
        Rollouts(recipe, Few(FAMILIES), {}).problems(0)
    assert len(Rollouts(Reinforcement.read({**SMALL, "problems": 4}), Few(FAMILIES), {}).problems(1)) == 4, "it begins again"


def test_a_log_in_another_tokenizers_ids_is_refused(tmp_path: Path) -> None:
    words = ["play", "--task", "hops", "--questioner", "oracle", "--answerer", "oracle", "--split", "train", "--n", "4"]
    assert main([*words, "--out", str(tmp_path / "hops")]) == 0
    with pytest.raises(RowError, match="holds ids of the tokenizer"):
        offline(tmp_path / "out", tmp_path / "hops", objective={"name": "awr"})


def test_a_resume_from_other_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(starter("questioner"), tmp_path / "start")
    go(tmp_path / "run", questioner=str(tmp_path / "start"), iterations=1, save_every=1)
    weights = load_file(tmp_path / "start" / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"'questioner' holds the weights .* was begun with"):
        go(tmp_path / "run", questioner=str(tmp_path / "start"), iterations=2, save_every=1, resume=True)


def test_a_role_that_says_nothing_for_an_iteration_stays_as_it_is(tmp_path: Path) -> None:
    """With a single turn the questioner must conclude, so nobody asks the answerer."""
    roles = ["questioner", "answerer"]
    (line,) = go(tmp_path, trained=roles, lr=1e-3, max_turns=1, iterations=1)
    assert line["answerer streams"] == 0.0 < line["questioner streams"]
    assert gap(tmp_path / "questioner", starter("questioner")) > 0.0 == gap(tmp_path / "answerer", starter("answerer"))


def test_an_iteration_in_which_whoever_is_to_move_says_nothing_is_idle_and_a_resume_passes_it_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weight moves then, not even by momentum, or the gate would refuse the next iteration; killed before it or after it, the run goes
    on as if it had not been.
    """
    settings: dict[str, Any] = {"trained": ["questioner", "answerer"], "alternate": 1, "max_turns": 1, "passes": 2, "save_every": 1}
    whole = go(tmp_path / "whole", **settings, iterations=5)
    told = capsys.readouterr().err
    assert all(f"iteration {step} teaches nothing: 'answerer', whose turn it is, said nothing" in told for step in (1, 3))
    assert [(line["losses"] == [0.0, 0.0], line["idle"] == 1.0, line.get("answerer streams")) for line in whole[1::2]] == [
        (True, True, 0.0)
    ] * 2
    assert all(line["questioner kl"] > 0 for line in whole[2::2]) and all(line["idle"] < 1 for line in whole[::2])
    assert gap(tmp_path / "whole" / "answerer", starter("answerer")) == 0.0
    for taken in (1, 2, 3):
        out = tmp_path / str(taken)
        go(out, **settings, iterations=taken)
        assert latest(out / "trainer") == out / "trainer" / f"checkpoint-{2 * taken}"
        again = go(out, **settings, iterations=5, resume=True)
        kept = ("losses", "reward", "idle", "averages", "questioner penalty", "answerer penalty", "questioner kl", "questioner entropy")
        assert [[line.get(name) for name in kept] for line in again] == [[line.get(name) for name in kept] for line in whole]
        assert gap(out / "questioner", tmp_path / "whole" / "questioner") == 0.0


def test_an_idle_iteration_is_passed_with_a_critic_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trained": ["questioner", "answerer"], "alternate": 1, "max_turns": 1, "objective": {"name": "ppo"}}
    lines = go(tmp_path, **settings, iterations=3)
    assert [line["idle"] == 1.0 for line in lines] == [False, True, False]


def test_a_lone_role_that_says_nothing_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="iteration 0 has nothing that answerer said; is it a seat"):
        go(tmp_path, trained=["answerer"], max_turns=1, iterations=1)


def test_replies_that_were_all_cut_off_are_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"9 of its 9 replies were cut off at the length limit; raise max_tokens"):
        go(tmp_path, max_tokens=1, max_turns=1, iterations=1)


def test_an_iteration_that_teaches_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = go(tmp_path, objective={"name": "filter", "least": 9.0}, iterations=1)
    assert line["idle"] == 1.0 and "iteration 0 teaches nothing" in capsys.readouterr().err


def test_rewards_of_ones_own_are_given_by_name(tmp_path: Path) -> None:
    recipe = {**SMALL, "iterations": 1, "rewards": {"entropy_of_mine": 0.5}}
    mine = {"entropy_of_mine": lambda episode: float(len(episode.calls()))}
    (line,) = reinforced(recipe, tmp_path, Shapes(FAMILIES), rewards=mine)
    rows = list(read_rows(RunReader(tmp_path), ["questioner"]))
    earned = [(row.reward("exact_match") or 0.0) + 0.5 * (row.reward("entropy_of_mine") or 0.0) for row in rows]
    assert all(row.reward("entropy_of_mine") for row in rows) and line["reward"] == pytest.approx(sum(earned) / len(earned))
    with pytest.raises(RecipeError, match=r"entropy_of_mine.*the recipe names runs"):
        reinforced({"runs": [str(tmp_path)]}, tmp_path / "out", rewards=mine)


def test_the_tasks_own_score_has_the_weight_that_the_recipe_gives_it(tmp_path: Path) -> None:
    """In the trace and in what is learned from; the score that is told stays as it is."""
    rewards = {"exact_match": 0.25, "questions": -0.05}
    (line,) = go(tmp_path / "run", rewards=rewards, iterations=1)
    rows = list(read_rows(RunReader(tmp_path / "run"), ["questioner"]))
    assert {(note.weight, note.source) for row in rows for note in row.rewards if note.name == "exact_match"} == {(0.25, "task:shapes")}
    earned = [sum(weight * (row.reward(name) or 0.0) for name, weight in rewards.items()) for row in rows]
    right = [row.reward("exact_match") or 0.0 for row in rows]
    assert (
        line["reward"] == pytest.approx(sum(earned) / len(earned))
        and line["score"] == pytest.approx(sum(right) / len(right))
        and any(right)
    )
    with pytest.raises(RecipeError, match="begun with another recipe"):
        go(tmp_path / "run", rewards={"questions": -0.05}, iterations=1, resume=True)
    with pytest.raises(RecipeError, match="got no weight but 0"):
        Reinforcement.read({"rewards": {"exact_match": 0.0}})
    with pytest.raises(RecipeError, match="'exact_match' is the task's own score"):
        reinforced({**SMALL, "iterations": 1}, tmp_path / "own", Shapes(FAMILIES), rewards={"exact_match": lambda episode: 1.0})


def test_a_judge_who_gives_no_mark_ends_the_command_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monologue.rollouts.chat_model", lambda named: GenericFakeChatModel(messages=iter(["splendid"] * 99)))
    words = ["--set", 'judge="openai:anyone"', "--set", "rewards={ judge = 0.1 }", "--set", "problems=1", "--set", "samples=2"]
    assert main(["train", "reinforce", "reinforce", *words, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "monologue: expected a whole number from 0 to 10 from the judge, got 'splendid'" in told and "Traceback" not in told


def test_the_commands_in_the_papers_recipe_run(tmp_path: Path) -> None:
    play = (ROOT / "training" / "recipes" / "immo.toml").read_text().splitlines()[0].removeprefix("# monologue ").split()
    assert main([*play[: play.index("--n")], "--n", "2", "--questioner", "oracle", "--out", str(tmp_path / "corpus")]) == 0
    assert {call.node for episode in RunReader(tmp_path / "corpus").episodes() for call in episode.calls()} == {"caption", "ask", "answer"}
    released = ["--set", 'trained=["questioner"]', "--set", "alternate=0", "--set", "lr=3e-4", "--set", 'compat="released"']
    assert main(["train", "reinforce", "immo", *released, "--dry-run"]) == 0


def test_recipes_refuse_what_cannot_be_honoured(capsys: pytest.CaptureFixture[str]) -> None:
    for settings, word in (
        ({"objective": {"name": "topr", "cap": 2.0}}, "cap"),
        ({"objective": {"name": "dpo"}}, "dpo"),
        ({"alternate": 3}, "two trained roles"),
        ({"compat": "released"}, "ppo on the questioner alone"),
        ({"runs": ["x"], "objective": {"name": "ppo"}}, "fresh episodes"),
        ({"lr": {"answerer": 1e-4}}, "one rate for each"),
        ({"reference": False, "objective": {"name": "ppo"}}, "reference=true"),
        ({"runs": ["x"], "problems": 3}, "belong to playing"),
        ({"rows": 3}, "belong to logged runs"),
        ({"speed": 1}, "speed"),
        ({"mixed": "bfloat16"}, "tolerance of its own"),
        ({"verified": 4, "objective": {"name": "ppo"}}, "does not go with objective 'ppo'"),
        ({"verified": 4, "mixed": "bfloat16", "tolerance": 0.1}, "mixed='bfloat16'"),
        ({"shard": True, "lora": {}}, "not sharded"),
        ({"lr": -1e-4}, "greater than 0"),
        ({"lr": {"questioner": 0.0}}, "greater than 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"share": 0.5}, "share belongs to credit='per_role'"),
        ({"discount": 0.5}, "discount belongs to credit='turn'"),
        ({"objective": {"name": "ppo"}, "credit": "turn"}, "would be ignored"),
        ({"objective": {"name": "filter"}, "credit": "counterfactual"}, "would be ignored"),
        ({"credit": "counterfactual", "rewards": {"counterfactual": 0.5}}, "leave it out of rewards"),
        ({"runs": ["x"], "first": 5, "split": "test", "examine": 3, "keep": 9}, "examine, first, keep, split belong to playing"),
        ({"runs": ["x"], "objective": {"name": "awr"}, "proof": 64}, "proof=64 would be ignored"),
        ({"rewards": {"questions": math.nan}}, "finite number"),
    ):
        with pytest.raises(RecipeError, match=word):
            Reinforcement.read(settings)
    with pytest.raises(RecipeError, match="several processes, got one"):
        Policies({}).shard()
    with pytest.raises(RecipeError, match="unknown rewards beauty"):
        reinforce(Reinforcement(rewards={"beauty": 1.0}), "/nowhere", {})
    for shipped in ("reinforce", "outcome", "offline", "immo"):
        recipe = Reinforcement.read(read_recipe(shipped))
        assert main(["train", "reinforce", shipped, "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out) == recipe.model_dump(mode="json")
    assert main(["train", "reinforce", "reinforce", "--set", 'task="nothing"']) == 2
    assert "unknown task 'nothing'" in capsys.readouterr().err


def command(out: Path, *more: str, launcher: tuple[str, ...] = (), **own: Any) -> list[str]:
    settings = {**SMALL, "iterations": 6, "save_every": 2, "passes": 2, **own}
    words = [sys.executable, *launcher, "-m", "monologue", "train", "reinforce", "reinforce", "--out", str(out), *more]
    for key, value in settings.items():
        words += [] if isinstance(value, dict) else ["--set", f"{key}={json.dumps(value)}"]
    tables = ('objective={ name = "ppo", kl = 0.05 }', "rewards={ questions = -0.05, tokens = -0.02 }", "guards={ entropy = 1e-9 }")
    return [*words, *(word for table in tables for word in ("--set", table))]


def surroundings() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {"env": environment, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def losses(out: Path) -> list[Any]:
    """Of every step: loss, what went into it, and what is carried on."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [[line[name] for name in ("losses", "reward", "kl", "entropy", "penalty", "explained")] for line in lines]


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_what_was_played(tmp_path: Path) -> None:
    whole = go(tmp_path)
    shutil.rmtree(tmp_path / "trainer")
    first = go(tmp_path, resume=True)
    assert [line["losses"] for line in first] == [line["losses"] for line in whole] and len(first) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list(RunReader(tmp_path).episodes())) == 2 * 9


def test_a_finished_run_is_told_as_such_and_goes_on_with_more_iterations_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are written as they were, and the library is not asked to take steps that are none."""
    whole = go(tmp_path)
    shutil.copytree(tmp_path / "questioner", tmp_path / "before")
    shutil.rmtree(tmp_path / "questioner")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("nothing is left to do"))
        assert go(tmp_path, resume=True) == whole
    assert f"finished, all of its 2 steps were taken before; its result is in {tmp_path / 'questioner'}" in capsys.readouterr().err
    assert gap(tmp_path / "before", tmp_path / "questioner") == 0.0
    with pytest.raises(RecipeError, match=r"expected at least 2 iterations.*got iterations=1"):
        go(tmp_path, resume=True, iterations=1)
    assert len(go(tmp_path, resume=True, iterations=3)) == 3 and "finished" not in capsys.readouterr().err


def test_two_processes_take_the_steps_of_one_with_whole_weights_and_with_shared_out_ones(tmp_path: Path) -> None:
    """Only the first plays and writes; each learns from its share of the rows; gradients, and shares of the weights, meet over gloo."""
    own = {"iterations": 2, "dtype": "float64", "tolerance": 1e-3, "minibatches": 2, "save_every": 1}
    plain = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    for name, launcher, more in (("one", (), {}), ("two", plain, {}), ("sharded", (*launch, "--dynamo_backend", "no"), {"shard": True})):
        done = subprocess.run(command(tmp_path / name, launcher=launcher, **own, **more), **surroundings())
        assert done.returncode == 0, done.stderr.decode()
    for name in ("two", "sharded"):
        for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / name), strict=True):
            assert one[0] == pytest.approx(two[0], abs=1e-6) and one[1:] == pytest.approx(two[1:], abs=1e-6) and len(one[0]) == 4
        apart = gap(tmp_path / "one" / "questioner", tmp_path / name / "questioner")
        assert apart < 1e-6 < 1e-5 < gap(tmp_path / "one" / "questioner", starter("questioner"))
    left = tmp_path / "sharded" / "trainer"
    shutil.copytree(tmp_path / "sharded" / "questioner", tmp_path / "before")
    shutil.rmtree(left / "checkpoint-8")
    first = (left / "checkpoint-4" / "optimizer.pt").stat().st_mtime_ns
    words = [*command(tmp_path / "sharded", launcher=(*launch, "--dynamo_backend", "no"), **own, shard=True), "--resume"]
    done = subprocess.run(words, **surroundings())
    assert done.returncode == 0, done.stderr.decode()
    assert len(losses(tmp_path / "sharded")) == 2 and (left / "checkpoint-8").is_dir()
    assert (left / "checkpoint-4" / "optimizer.pt").stat().st_mtime_ns == first, "it went on from there"
    assert gap(tmp_path / "before", tmp_path / "sharded" / "questioner") == 0.0


def test_a_tracker_is_told_every_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's own reader finds in its own files what stands in the run's curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    lines = go(tmp_path / "run", report_to=["tensorboard"], passes=2)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name in ("reward", "kl", "entropy", "turns", "clipped", "loss"):
        told = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert told == pytest.approx({2 * (line["step"] + 1): line[name] for line in lines}, abs=1e-6), name


def test_matrix_products_in_bfloat16_learn_and_are_told_apart_from_the_engines(tmp_path: Path) -> None:
    lines = go(tmp_path, mixed="bfloat16", tolerance=0.2, passes=2)
    assert all(1e-5 < line["drift"] < 0.02 for line in lines) and 0 <= lines[0]["kl"] < 1e-3 < lines[1]["kl"]
    assert {str(value.dtype) for value in load_file(tmp_path / "questioner" / "model.safetensors").values()} == {"torch.float32"}
    with pytest.raises(GateError, match="differ by"):
        go(tmp_path / "strict", mixed="bfloat16", tolerance=1e-5)


def test_a_killed_run_goes_on_with_the_same_losses_to_the_last_bit(tmp_path: Path) -> None:
    options = surroundings()
    whole = subprocess.run(command(tmp_path / "whole"), **options)
    assert whole.returncode == 0, whole.stderr.decode()
    killed = subprocess.Popen(command(tmp_path / "killed"), **options)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.02)
    time.sleep(0.15)  # somewhere within the fourth iteration
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was killed, it did not end"
    killed.communicate()
    checkpoint = latest(tmp_path / "killed" / "trainer")
    assert checkpoint is not None and checkpoint.name in ("checkpoint-4", "checkpoint-8")
    resumed = subprocess.run([*command(tmp_path / "killed"), "--resume"], **options)
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    assert gap(tmp_path / "killed" / "questioner", tmp_path / "whole" / "questioner") == 0.0
    finished = [e for e in RunReader(tmp_path / "killed").episodes() if e.complete]
    assert len(finished) == 6 * 9 == len({e.start.episode_id for e in finished}), "nothing was played twice"
    assert not torch.isnan(torch.tensor([value for line in losses(tmp_path / "whole") for value in line[0]])).any()


def test_rows_that_begin_alike_share_a_line_and_nothing_else_changes(tmp_path: Path) -> None:
    """Log-probs and gradients of both roles, pictures included, are those of separate rows; fewer ids are read."""
    go(tmp_path / "run", trained=["questioner", "answerer"], iterations=1)
    reader = RunReader(tmp_path / "run")
    for role in ("questioner", "answerer"):
        learner, rows = Learner.open(str(starter(role)), dtype="float64"), list(read_rows(reader, [role]))
        told = {}
        for trees in (False, True):
            batch = Collate(learner.inputs, reader.picture, trees=trees)(rows)
            logprobs = score(learner.checkpoint.model, batch, learner.inputs.banned).logprobs
            learner.checkpoint.model.zero_grad()
            (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
            gradient = torch.cat([one.grad.flatten() for one in learner.trained if one.grad is not None])
            told[trees] = (logprobs.detach(), gradient, batch.inputs["input_ids"].numel(), batch.sampled)
        plain, shared = told[False], told[True]
        assert torch.equal(plain[3], shared[3]) and float((plain[0] - shared[0]).abs().max()) < 1e-9
        assert float((plain[1] - shared[1]).abs().max()) < 1e-6 * float(plain[1].abs().max()) and shared[2] < 0.8 * plain[2]
        if role == "answerer":
            assert len(batch.inputs["image_grid_thw"]) == 3 < len(rows), "a picture is encoded once for its group"
    settings: dict[str, Any] = {"iterations": 1, "passes": 3, "dtype": "float64", "tolerance": 1e-3}
    plain_line, trees_line = (go(tmp_path / str(trees), trees=trees, **settings)[0] for trees in (False, True))
    assert plain_line["losses"] == pytest.approx(trees_line["losses"], abs=1e-5) and len(set(plain_line["losses"])) == 3
