"""The embedded answerer as the trainer sees it: pictures in, visual tokens, next-word logits, and its two losses.

B pictures, T tokens, D width, V vocabulary. Every sequence starts ``<bos> <user> <|vision_start|>`` and nine placeholders, so the M-RoPE
positions are one fixed table: three text steps, a 3 x 3 grid, then text again from the grid's far corner. A test holds this forward
pass equal to the model's own with ``pixel_values``.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from monologue.tasks.shapes.scene import Scene
from monologue.training.starter.batches import IGNORED, VISUAL_TOKENS, Batch, Words, cell_words

HEAD = 3
"""Tokens before the first placeholder."""
BODY = HEAD + VISUAL_TOKENS


def positions(batch: int, length: int) -> Tensor:
    """M-RoPE positions along time, height and width: (3, B, T)."""
    table = torch.zeros(3, length, dtype=torch.long)
    table[:, :HEAD] = torch.arange(HEAD)
    cells = torch.arange(VISUAL_TOKENS)
    table[:, HEAD:BODY] = HEAD + torch.stack([torch.zeros_like(cells), cells // 3, cells % 3])
    table[:, BODY:] = HEAD + 3 + torch.arange(length - BODY)
    return table[:, None].expand(3, batch, length)


class Sight(nn.Module):
    """An answerer under training."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, words: Words) -> None:
        super().__init__()
        self.model, self.words = model, words
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """(B * 36, P) patches to (B, 9, D)."""
        batch = pixels.shape[0] // (4 * VISUAL_TOKENS)
        grid = torch.tensor([[1, 6, 6]]).expand(batch, 3)
        seen = self.model.model.visual(pixels, grid_thw=grid).pooler_output
        return cast(Tensor, seen.view(batch, VISUAL_TOKENS, -1))

    def hidden(self, ids: Tensor, visual: Tensor) -> Tensor:
        """(B, T) ids and (B, 9, D) visual tokens to (B, T, D)."""
        x = self.embedding(ids)
        x = torch.cat([x[:, :HEAD], visual, x[:, BODY:]], dim=1)
        out = self.model.model.language_model(inputs_embeds=x, position_ids=positions(*ids.shape), attention_mask=None, use_cache=False)
        return cast(Tensor, out.last_hidden_state)

    def spoken(self, batch: Batch, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels at the positions where the policy speaks: (S, V) and (S,)."""
        said = batch.labels[:, 1:] != IGNORED
        states = self.hidden(batch.ids, visual)[:, :-1][said]
        return states @ self.embedding.weight.T, batch.labels[:, 1:][said]

    def speak_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of what the policy says. No gradient enters the picture tower."""
        assert batch.pixels is not None
        with torch.no_grad():
            visual = self.visual_tokens(batch.pixels)
        return F.cross_entropy(*self.spoken(batch, visual))

    def see_loss(self, pixels: Tensor, scenes: tuple[Scene, ...]) -> Tensor:
        """Visual words: each visual token, read through the word embeddings, names its cell and what stands there."""
        visual = self.visual_tokens(pixels)
        target = cell_words(scenes, self.words, self.embedding.num_embeddings)
        return -(target * F.log_softmax(visual @ self.embedding.weight.T, dim=-1)).sum(-1).mean()

    def tower(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if ".visual." in name]

    def language(self) -> list[tuple[str, nn.Parameter]]:
        """Without the word embeddings: the tower's tokens are written in them, so moving them would unlearn how to see."""
        return [(name, p) for name, p in self.model.named_parameters() if ".visual." not in name and "embed_tokens" not in name]
