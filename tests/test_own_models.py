"""Models of other families through the command line: tiny random Qwen3 and Qwen2.5-VL with chat templates of their own."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from monologue.backends.checkpoints import quiet
from monologue.cli import main
from monologue.traces.store import RunReader
from monologue.training.rewards import REWARDS
from tests.tokens import HERMES, PLAIN, chat_tokenizer


def text_config(size: int) -> dict[str, Any]:
    return {
        **{"vocab_size": size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096, "initializer_range": 0.3},
    }


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(HERMES)
    return save(tmp_path_factory.mktemp("qwen3"), Qwen3ForCausalLM(Qwen3Config(**text_config(len(tokenizer)))), tokenizer)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder, tokenizer = tmp_path_factory.mktemp("qwen2_5_vl"), chat_tokenizer(PLAIN)
    marks = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    sight = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2, "hidden_size": 32}
    sight |= {"out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
    text = {**text_config(len(tokenizer)), "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight, **ids, video_token_id=0)
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=112 * 112).save_pretrained(folder)
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), tokenizer)


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
    assert len(lines) == 2 and lines[1]["kl"] > 0 and all(line["compared"] == line["sampled"] > 0 for line in lines)
    assert main(["verify", str(tmp_path / "run")]) == 0, capsys.readouterr().out


def test_a_text_model_in_the_answerers_seat_is_refused(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["play", "--answerer", str(llm), "--graph", "direct", "--n", "1", "--out", str(tmp_path / "run")]) == 2
    assert "text-only" in capsys.readouterr().err
