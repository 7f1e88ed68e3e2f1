"""What reading block by block need not do: copy what it keeps, and compute what nobody asks for.

``Kept`` holds a layer's keys and values in a buffer with room for what follows. transformers' own joins old and new by a copy of both,
for every layer, step and word: a seventh of the time of 32 lanes (``bench/latent.py``). With gradients it must, and does here too.

``ends`` spares most of the last layer. Of a prompt and of a latent step only the last place is read on; before it the last layer has to
make keys and values, and its feed-forward part, three quarters of its products, makes nothing that anybody sees. What was left out: its
queries and its attention at those places, which no family lets be taken apart from the outside.

Shapes: B lanes, L places of a block, S places so far, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

SPARE = 0.5
"""Room beyond what is needed, as a share of it, when a buffer is made."""


class Kept(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values (B, H, S, D) of one layer."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)  # type: ignore[no-untyped-call]
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **other: Any) -> tuple[Tensor, Tensor]:
        """All so far, with ``key_states`` and ``value_states`` (B, H, L, D) behind the rest."""
        keys, values = self.keys, self.values
        if torch.is_grad_enabled() or keys is None or values is None:
            self._room = None
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *more, **other)
            return grown
        before, after = keys.shape[-2], keys.shape[-2] + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < after or self._room[0].is_inference() != torch.is_inference_mode_enabled():
            self._room = (_roomy(keys, after), _roomy(values, after))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., before:after, :] = new
        joined = (self._room[0][..., :after, :], self._room[1][..., :after, :])
        self.keys, self.values = joined
        return joined


def _roomy(kept: Tensor, needed: int) -> Tensor:
    room = kept.new_empty(*kept.shape[:-2], needed + int(SPARE * needed), kept.shape[-1])
    room[..., : kept.shape[-2], :] = kept
    return room


@contextmanager
def ends(layer: Any, at: Tensor) -> Iterator[None]:
    """Within, the feed-forward part of ``layer`` computes place ``at`` (B,) of each lane alone, and the rest of what the layer gives is
    not to be used. A layer whose part goes by another name than ``mlp`` computes everything.
    """
    part = getattr(layer, "mlp", None)
    if part is None:
        yield
        return
    lanes, length = torch.arange(len(at), device=at.device), 0

    def take(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal length
        length = given[0].shape[1]
        return (given[0][lanes, at].unsqueeze(1), *given[1:])  # (B, 1, D)

    def put(_: Any, __: Any, made: Any) -> Any:
        first, rest = (made, ()) if isinstance(made, Tensor) else (made[0], made[1:])  # a mixture of experts may tell its routing, too
        whole = first.new_zeros(len(at), length, first.shape[-1]).index_put((lanes, at), first[:, 0])  # (B, L, D)
        return (whole, *rest) if rest else whole

    hooks = (part.register_forward_pre_hook(take), part.register_forward_hook(put))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
