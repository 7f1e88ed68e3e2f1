"""The released IVT-LR code, run as it is from a user's own checkout, and random models small enough to compare with it.

    git clone https://github.com/FYYDCC/IVT-LR           # or a fork; nothing of it is copied here
    export MONOLOGUE_IVTLR=$PWD/IVT-LR

Its model file (``qwen_vl/qwen_ivtlr.py``, commit a47db8c) was written for transformers 4.51. Three stand-ins let it run, unchanged, with a
current one: ``visual`` of the model, returning the merged patches; no pixels passed on beside embeddings; attention maps from the eager
function. Two more keep its import quiet: no processor of a 7B model is downloaded for a decode whose result is dropped, and no log file
is opened in the working directory. Its own assertions stay in force: batch of one, one picture.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

VARIABLE = "MONOLOGUE_IVTLR"
HOW = f"set {VARIABLE} to a checkout of github.com/FYYDCC/IVT-LR"
EOS, START, END, IMAGE, VIDEO, LATENT = 1, 2, 3, 4, 5, 6
WORDS = 8
"""First id that means nothing special."""


def checkout() -> Path | None:
    """Where the user says the released code is; None where nothing is said."""
    found = os.environ.get(VARIABLE)
    return Path(found) if found else None


def model(layers: int, width: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A random Qwen2-VL with eager attention, as the released code demands."""
    torch.manual_seed(seed)
    heads = 4 if width < 256 else 8
    sections = [width // heads // 8, width // heads // 16 * 3, width // heads // 16 * 3]
    text = {
        **{"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width * 3, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 4096, "initializer_range": 0.1},
        **{"eos_token_id": EOS, "bos_token_id": 0, "pad_token_id": 0},
        "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4},
    }
    sight = {"depth": 2, "embed_dim": 64, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    made: Any = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=sight, **ids))
    made.set_attn_implementation("eager")
    return made.to(dtype).eval().requires_grad_(False)


def prompt(words: int, grid: int, seed: int, vocabulary: int, dtype: torch.dtype) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Random ids around one random picture of ``grid`` x ``grid`` visual tokens: ids, pixels (N, values), grids (1, 3)."""
    dice = torch.Generator().manual_seed(seed)
    said = torch.randint(WORDS, vocabulary, (words,), generator=dice).tolist()
    ids = (*said[:4], START, *[IMAGE] * grid**2, END, *said[4:])
    pixels = torch.randn(4 * grid**2, 3 * 2 * 14 * 14, generator=dice, dtype=torch.float64).to(dtype)
    return ids, pixels, torch.tensor([[1, 2 * grid, 2 * grid]])


class _Base(nn.Module):
    """The model as the released code knew it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        tower = inner.model.visual

        def visual(pixels: Tensor, grid_thw: Tensor) -> Tensor:
            merged: Tensor = tower(pixels, grid_thw=grid_thw).pooler_output
            return merged

        visual.get_dtype = tower.get_dtype  # type: ignore[attr-defined]
        self.visual = visual

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, **given: Any) -> Any:
        if "inputs_embeds" in given:
            given |= {"pixel_values": None, "image_grid_thw": None}
        return self.inner(**given)


def released(base: Any, k: int, place: Path) -> Any:
    """The released ``IVTLR`` over ``base``. Raises FileNotFoundError for a checkout without it."""
    file = place / "qwen_vl" / "qwen_ivtlr.py"
    if not file.is_file():
        raise FileNotFoundError(f"expected the released code at {str(file)!r}; {HOW}")
    spec = importlib.util.spec_from_file_location("qwen_ivtlr", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    quiet = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=lambda *a, **b: None))
    with patch("transformers.AutoProcessor.from_pretrained", return_value=quiet), patch.object(logging, "basicConfig"):
        spec.loader.exec_module(module)
        return module.IVTLR(_Base(base), LATENT, -1, -1, EOS, IMAGE, START, END, k)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The released generate() prints at its end."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
