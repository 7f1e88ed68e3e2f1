"""Keys and values of what was read, in buffers with room for what follows.

transformers' own layers join old and new by a copy of both: for every layer, step and word. That was a seventh of the time of 32 lanes that
take latent steps. Here a word is written behind the others, for half as much memory again. Where gradients are wanted both must be joined
after all, and are.

Shapes: B lanes, H heads, L new places, S places so far, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE = 0.5
"""Room beyond what is needed, as a share of it, when a buffer is made."""


class Kept(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's, (B, H, S, D) each."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **other: Any) -> tuple[Tensor, Tensor]:
        """All so far, with ``key_states`` and ``value_states`` (B, H, L, D) behind the rest."""
        keys, values = self.keys, self.values
        if torch.is_grad_enabled() or keys is None or values is None:
            joined: tuple[Tensor, Tensor] = super().update(key_states, value_states, *more, **other)
            return joined
        before, after = keys.shape[-2], keys.shape[-2] + key_states.shape[-2]
        if self._room is None or not _begins(self._room[0], keys, after):
            self._room = (_moved(keys, after), _moved(values, after))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., before:after, :] = new
        self.keys, self.values = grown = (self._room[0][..., :after, :], self._room[1][..., :after, :])
        return grown

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some lanes, in this order. The buffer is let go first: it would be held beside what is taken from it."""
        self._room = None
        super().batch_select_indices(indices)


def _begins(room: Tensor, kept: Tensor, needed: int) -> bool:
    """Whether ``kept``, in whose place somebody may have put others, begins a buffer that is large enough and may be written to."""
    same = kept.data_ptr() == room.data_ptr() and kept.shape[:2] == room.shape[:2]
    return same and room.shape[-2] >= needed and room.is_inference() == torch.is_inference_mode_enabled()


def _moved(kept: Tensor, needed: int) -> Tensor:
    room = kept.new_empty(*kept.shape[:-2], needed + int(SPARE * needed), kept.shape[-1])
    room[..., : kept.shape[-2], :] = kept
    return room


def empty() -> Cache:
    """For a model whose every layer attends to all."""
    return Cache(layer_class_to_replicate=Kept)


def roomy(cache: Any) -> Any:
    """What a model has begun, with room for more, in place; layers that forget, or do not attend, stay as they are."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = Kept
    return cache
