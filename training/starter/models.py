"""The starter family: real ``transformers`` classes at the smallest size that learns the shapes world on two cores.

    questioner   Qwen3ForCausalLM                  text only
    answerer     Qwen2VLForConditionalGeneration   patch 14, merge 2: one visual token per board cell
    direct       the answerer's class with more layers, so that it has as many parameters as the two above together

Widths near 100 die under the usual initial spread of 0.02, so weights start at 1/sqrt(fan in) and embeddings at 1/sqrt(width).
"""

from __future__ import annotations

import math
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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the shapes world, lower case, punctuation apart. Ids are the order of SPECIALS, then VOCABULARY.

    Text is words with a space between, but none inside ``<|vision_start|><|image_pad|><|vision_end|>``: SGLang decodes a prompt and looks
    for these three as one piece, and where it does not find them it drops the picture without a word.
    """
    table = {word: index for index, word in enumerate((*SPECIALS, *VOCABULARY))}
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


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Resizes any picture to 84 x 84 pixels: 36 patches, 9 visual tokens."""
    pixels = SIDE_PIXELS**2
    return Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=pixels, max_pixels=pixels)


def build_questioner(seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(**_text(tokenizer), tie_word_embeddings=True)
    return _spread(Qwen3ForCausalLM(config), seed)


def build_answerer(seed: int, tokenizer: PreTrainedTokenizerFast, layers: int = LAYERS) -> Qwen2VLForConditionalGeneration:
    word = tokenizer.get_vocab().__getitem__
    rope = {"rope_type": "default", "type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    config = Qwen2VLConfig(
        text_config={**_text(tokenizer), "num_hidden_layers": layers, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={
            **{"depth": 2, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 2, "hidden_size": WIDTH},
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
