"""The starter family: real ``transformers`` classes at the smallest size that learns the shapes world on two cores.

    questioner   Qwen3ForCausalLM                  text only
    answerer     Qwen2VLForConditionalGeneration   patch 14, merge 2: one visual token per board cell
    direct       the answerer's class with more layers, so that it has as many parameters as the two above together
    speaker      the answerer's class, half as wide and deep: every seat of the hops world, and where a thinker begins

Widths near 100 die under the usual initial spread of 0.02, so weights start at 1/sqrt(fan in) and embeddings at 1/sqrt(width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from monologue.backends.tokens import SPECIALS
from monologue.tasks.shapes.language import VOCABULARY

Model = TypeVar("Model", bound=nn.Module)
WIDTH, HEADS, LAYERS, INTER = 128, 4, 4, 320
CONTEXT = 512
SIDE_PIXELS = 84


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token per word of a world, lower case, punctuation apart. Ids are the order of SPECIALS, then the vocabulary's.

    Text is words with a space between, but none inside ``<|vision_start|><|image_pad|><|vision_end|>``: SGLang decodes a prompt and looks
    for these three as one piece, and where it does not find them it drops the picture without a word.
    """
    table = {word: index for index, word in enumerate((*SPECIALS, *vocabulary))}
    core = Tokenizer(WordLevel(table, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
    closed = decoders.Replace(Regex(r" (?=<\|(image_pad|video_pad|vision_end)\|>)"), "")
    core.decoder = decoders.Sequence([decoders.WordPiece(prefix="\0", cleanup=False), decoders.Fuse(), closed])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIALS[4:]),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor(wide: int = SIDE_PIXELS, high: int = SIDE_PIXELS) -> Qwen2VLImageProcessorPil:
    """Resizes any picture to as many pixels as 84 x 84 have (36 patches, 9 visual tokens), or to another number."""
    pixels = wide * high
    return Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=pixels, max_pixels=pixels)


def build_questioner(seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(**_text(tokenizer), tie_word_embeddings=True)
    return _spread(Qwen3ForCausalLM(config), seed)


def build_answerer(seed: int, tokenizer: PreTrainedTokenizerFast, layers: int = LAYERS) -> Qwen2VLForConditionalGeneration:
    text = {**_text(tokenizer), "num_hidden_layers": layers}
    return _sighted(text, {"depth": 2, "embed_dim": 96}, [4, 6, 6], 1e6, tokenizer, seed)


def build_speaker(seed: int, tokenizer: PreTrainedTokenizerFast, width: int = 64, layers: int = 3) -> Qwen2VLForConditionalGeneration:
    """The smallest that learns the hops world: three layers find the start in a question and look up once; four look-ups are too many."""
    size = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "head_dim": width // HEADS}
    half = width // HEADS // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    return _sighted({**_text(tokenizer), **size}, {"depth": 1, "embed_dim": 64}, sections, 1e4, tokenizer, seed)


def _sighted(
    text: dict[str, Any], sight: dict[str, Any], sections: list[int], theta: float, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen2VLForConditionalGeneration:
    word = tokenizer.get_vocab().__getitem__
    rope = {"rope_type": "default", "type": "default", "mrope_section": sections, "rope_theta": theta}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={
            **sight,
            **{"num_heads": 4, "mlp_ratio": 2, "hidden_size": text["hidden_size"]},
            **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
            "in_chans": 3,  # the name under which SGLang looks for it
        },
        image_token_id=word("<|image_pad|>"),
        video_token_id=word("<|video_pad|>"),
        vision_start_token_id=word("<|vision_start|>"),
        vision_end_token_id=word("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return _spread(Qwen2VLForConditionalGeneration(config), seed)


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@torch.no_grad()
def _spread(model: Model, seed: int) -> Model:
    """Draws all weights anew from the seed at a spread that suits small widths."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0, 1 / math.sqrt(module.embedding_dim))
        elif isinstance(module, nn.Linear | nn.Conv3d):
            module.weight.normal_(0, 1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                module.bias.zero_()
    return model
