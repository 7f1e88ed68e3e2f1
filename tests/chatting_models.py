"""Random Qwen3 and Qwen2.5-VL checkpoints with chat templates of their own, bytes for tokens and room for 4,096 of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from monologue.backends.checkpoints import quiet
from tests.tokens import HERMES, PLAIN, chat_tokenizer


def save_text_model(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(HERMES)
    return _save(folder, Qwen3ForCausalLM(Qwen3Config(**_text(tokenizer))), tokenizer)


def save_vision_model(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = chat_tokenizer(PLAIN)
    marks = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    sight = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2, "hidden_size": 32}
    sight |= {"out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
    text = {**_text(tokenizer), "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight, **ids, video_token_id=0)
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=112 * 112).save_pretrained(folder)
    return _save(folder, Qwen2_5_VLForConditionalGeneration(config), tokenizer)


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        **{
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
            "vocab_size": len(tokenizer),
        },
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096, "initializer_range": 0.3},
    }


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    tokenizer.pad_token = tokenizer.eos_token
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
