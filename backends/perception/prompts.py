"""A ragged batch of prompts with their pictures, ready for latent steps: word embeddings, the tower's output in its places, positions.

Works for every model with ``get_image_features`` and one placeholder a visual token (Qwen2-VL, Qwen2.5-VL, LLaVA), and for text models
that are given no picture. What a picture becomes here, before any decoder layer, is the pool that latent vision draws from.

Shapes: B lanes, L padded length, P position axes (1, or 3 for M-RoPE), J patches of the lane with most, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monologue.backends.base import RequestRefused
from monologue.backends.inputs import rope
from monologue.backends.perception.reading import bare


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt: latent steps follow its last id."""

    ids: tuple[int, ...]
    """Placeholders expanded."""
    pixels: Tensor | None = None
    """Its pictures, as the model's processor makes them."""
    grids: Tensor | None = None
    """(pictures, 3) patches along time, height and width; None for models that have no grid."""
    positions: Tensor | None = None
    """(P, L) where they are known; else the model is asked."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Some of them as tensors, padded on the left."""

    embeds: Tensor
    """(B, L, D), pictures in their places."""
    valid: Tensor
    """(B, L) bool."""
    positions: Tensor
    """(P, B, L), the model's own."""
    spots: Tensor
    """(B, J) place of each patch in L; -1 after a lane's last."""
    pictures: tuple[int, ...]
    """How many each lane has."""

    @property
    def there(self) -> Tensor:
        """(B, J) bool."""
        return self.spots >= 0

    @property
    def pool(self) -> Tensor:
        """(B, J, D) embeddings of the patches."""
        return self.embeds.gather(1, self.spots.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.embeds.shape[-1]))

    @property
    def picture(self) -> Tensor:
        """(B, L) bool: places of patches."""
        marks = torch.zeros_like(self.valid, dtype=torch.long)
        return marks.scatter_add(1, self.spots.clamp(min=0), self.there.long()) > 0


def prompts(model: Any, asked: Sequence[Asked]) -> Prompts:
    """Embeds a batch; gradients reach word embeddings and tower. Raises RequestRefused for pictures that do not fit."""
    if not asked or any(not one.ids for one in asked):
        raise RequestRefused(f"expected prompts of at least one id, got lengths {[len(one.ids) for one in asked]}")
    model = bare(model)
    device, length = model.device, max(len(one.ids) for one in asked)
    rows = [positions(model, one) for one in asked]
    ids = torch.zeros(len(asked), length, dtype=torch.long)
    valid = torch.zeros(len(asked), length, dtype=torch.bool)
    places = torch.zeros(len(rows[0]), len(asked), length, dtype=torch.long)
    for lane, one in enumerate(asked):
        start = length - len(one.ids)
        ids[lane, start:], valid[lane, start:], places[:, lane, start:] = torch.tensor(one.ids), True, rows[lane]
    ids, valid = ids.to(device), valid.to(device)
    placeholder = getattr(model.config, "image_token_id", None)
    seen = valid & (ids == placeholder) if placeholder is not None else torch.zeros_like(valid)
    embeds = _with_pictures(model, model.get_input_embeddings()(ids), seen, asked)
    return Prompts(embeds, valid, places.to(device), _spots(seen), tuple(map(_count, asked)))


def positions(model: Any, one: Asked) -> Tensor:
    """(P, L) of a prompt: the model's own rotary index where it has one, else 0, 1, 2. Raises RequestRefused."""
    if one.positions is not None:
        return one.positions
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(len(one.ids)).unsqueeze(0)
    if one.grids is None:
        return torch.arange(len(one.ids)).expand(3, -1)
    spots = tuple(place for place, token in enumerate(one.ids) if token == model.config.image_token_id)
    room = int(one.grids.prod(1).sum()) // model.config.vision_config.spatial_merge_size**2
    if len(spots) != room:
        raise RequestRefused(f"expected {room} placeholders for pictures of {one.grids.tolist()} patches, got {len(spots)}")
    return rope(model, len(one.ids), spots, tuple(map(tuple, one.grids.tolist())))


def _count(one: Asked) -> int:
    if one.pixels is None:
        return 0
    return len(one.pixels) if one.grids is None else len(one.grids)


def _with_pictures(model: Any, embeds: Tensor, seen: Tensor, asked: Sequence[Asked]) -> Tensor:
    """Puts the tower's output where the placeholders stand."""
    shown = [one for one in asked if one.pixels is not None]
    wanted = int(seen.sum())
    if not shown:
        if wanted:
            raise RequestRefused(f"expected pictures for {wanted} placeholders, got none")
        return embeds
    pixels = torch.cat([one.pixels for one in shown if one.pixels is not None]).to(embeds.device)
    grids = [one.grids for one in shown if one.grids is not None]
    more = {"image_grid_thw": torch.cat(grids).to(embeds.device)} if grids else {}
    found = model.model.get_image_features(pixels.to(embeds.dtype), **more, return_dict=True).pooler_output
    made = torch.cat(list(found)).to(embeds.dtype)  # (patches of all, D)
    if len(made) != wanted:
        raise RequestRefused(f"expected {len(made)} placeholders for the {len(made)} visual tokens of these pictures, got {wanted}")
    return embeds.masked_scatter(seen.unsqueeze(-1), made)


def _spots(seen: Tensor) -> Tensor:
    """(B, J) of a mask (B, L), in order, -1 behind the last."""
    width = int(seen.sum(1).max())
    order = (~seen).long().argsort(dim=1, stable=True)[:, :width]  # patches first, in order
    return order.masked_fill(~seen.gather(1, order), -1)
