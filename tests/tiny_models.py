"""Checkpoints of some thousand random weights, real ``transformers`` classes and tokenizers, saved and loaded as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

SPECIALS = ("<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WORDS = tuple(f"w{index}" for index in range(34))
SIZE = len(SPECIALS) + len(WORDS)
EOS, START, END, IMAGE, VIDEO = range(1, 6)
CONTEXT = 96
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def save_text_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**text_size(), tie_word_embeddings=True))
    return _save(folder, model)


def save_vision_model(folder: Path, family: str, seed: int = 0) -> Path:
    """``family`` is "qwen2" or "qwen2_5"."""
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=112 * 112).save_pretrained(folder)
    return _save(folder, _qwen(family, seed))


def _qwen(family: str, seed: int) -> Any:
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    common: dict[str, Any] = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    text = {**text_size(), "rope_parameters": rope}
    if family == "qwen2":
        sight = {**common, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=sight, **ids))
    sight = {**common, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight, **ids))


def exact(model: Any) -> Any:
    """The model in float64 throughout: transformers' own RMSNorm rounds to float32 on the way."""
    model = model.double()
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                other = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=torch.float64)
                other.load_state_dict(norm.state_dict())
                setattr(parent, name, other)
    return model.eval()


def seeing_model(family: str, seed: int = 0) -> Any:
    """``family`` is "qwen2", "qwen2_5", or "llava", whose tower is CLIP's and whose pictures have 28 x 28 pixels, 16 patches."""
    if family != "llava":
        return _qwen(family, seed)
    torch.manual_seed(seed)
    sight = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    config = LlavaConfig(
        text_config=LlamaConfig(**text_size()), vision_config=CLIPVisionConfig(**sight), image_token_id=IMAGE, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


def text_size() -> dict[str, Any]:
    return {
        **{"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": CONTEXT},
        **{"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": 0},
    }


def _save(folder: Path, model: Any) -> Path:
    core = Tokenizer(WordLevel({word: index for index, word in enumerate((*SPECIALS, *WORDS))}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder
