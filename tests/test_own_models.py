"""Models of other families through the command line: tiny random Qwen3 and Qwen2.5-VL with chat templates of their own."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from monologue.cli import main
from monologue.traces.store import RunReader
from monologue.training.rewards import REWARDS
from tests.chatting_models import save_text_model, save_vision_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.mark.parametrize("graph", ["monologue", "monologue:looks=1", "direct", "blind"])
def test_models_of_other_families_play_and_replay(llm: Path, vlm: Path, tmp_path: Path, graph: str) -> None:
    seats = {"direct": ["--answerer", str(vlm)], "blind": ["--questioner", str(llm)]}
    both = ["--questioner", str(llm), "--answerer", str(vlm)]
    words = [*seats.get(graph, both), "--graph", graph, "--temperature", "1", "--max-tokens", "12", "--max-turns", "3"]
    assert main(["play", *words, "--n", "3", "--out", str(tmp_path / "run")]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
    assert calls and all(call.sampled_logprobs for call in calls)
    assert {call.model for call in calls} <= {str(llm), str(vlm)}
    if graph == "direct":
        assert all(len(call.images) == 1 and call.images[0].grid == (1, 6, 6) for call in calls)


@pytest.mark.parametrize("role, graph", [("questioner", "monologue"), ("answerer", "direct")])
def test_models_of_other_families_are_reinforced(
    llm: Path, vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], role: str, graph: str
) -> None:
    """Chat templates, pictures, M-RoPE of their own: the gate compares every id. Random weights earn nothing, so odd ids are paid for."""
    monkeypatch.setitem(REWARDS, "odd", lambda episode: fmean(token % 2 for call in episode.calls() for token in call.sampled_ids))
    settings = [f'questioner="{llm}"', f'answerer="{vlm}"', f'graph="{graph}"', f'trained=["{role}"]', "truncated=true", "lr=1e-3"]
    settings += ["problems=2", "samples=3", "iterations=2", "max_tokens=12", "max_turns=3", "rewards={ odd = 1.0 }", 'families="near"']
    words = ["train", "reinforce", "reinforce", "--out", str(tmp_path / "run")]
    assert main([*words, *(word for setting in settings for word in ("--set", setting))]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and abs(lines[1]["kl"]) > 1e-4 and all(line["compared"] == line["sampled"] > 0 for line in lines)
    assert main(["verify", str(tmp_path / "run")]) == 0, capsys.readouterr().out


def test_a_text_model_in_the_answerers_seat_is_refused(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["play", "--answerer", str(llm), "--graph", "direct", "--n", "1", "--out", str(tmp_path / "run")]) == 2
    assert "text-only" in capsys.readouterr().err
