"""The one attention row that choosing needs, taken where every model family computes its attention.

The released code asks for all attention maps of all layers (about 3 GiB in one pass of Chameleon) and uses one row of each. Here an
attention function registered with transformers hands queries and keys, rotated as the family rotates them, to whoever asked, computes
that one row beside the layer's own attention, and leaves the layer's own arithmetic as it was (sdpa, or the family's eager function;
flash attention takes no mask of ours, so sdpa stands in for it). One function for all families: nothing here knows a model by name.

Shapes: B lanes, H heads, G heads per key head, S keys, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "monologue_attended"


class Row:
    """Attention of one query a lane over all keys, averaged over heads and layers as the model runs."""

    def __init__(self, at: Tensor | None, visible: Tensor | None, graph: bool = False) -> None:
        """``at`` (B,): the query's place in what is fed; None asks for no row. ``visible`` (B, S): keys it may weigh. ``graph``: gradients
        go through the weights.
        """
        self._at, self._visible, self._graph = at, visible, graph
        self._sum: Tensor | float = 0.0
        self._layers = 0

    @property
    def weights(self) -> Tensor:
        """(B, S), summing to 1."""
        assert isinstance(self._sum, Tensor), "no layer has run through the registered attention"
        return self._sum / self._layers

    def see(self, query: Tensor, key: Tensor, scaling: float, numbers: torch.dtype) -> None:
        """Adds a layer: queries (B, H, L, D), keys (B, H / G, S, D)."""
        if self._at is None or self._visible is None:
            return
        with torch.set_grad_enabled(self._graph and torch.is_grad_enabled()):
            self._add(query, key, scaling, numbers, self._at, self._visible)

    def _add(self, query: Tensor, key: Tensor, scaling: float, numbers: torch.dtype, at: Tensor, visible: Tensor) -> None:
        lanes, heads, _, width = query.shape
        one = query[torch.arange(lanes, device=query.device), :, at]  # (B, H, D)
        scores = one.view(lanes, key.shape[1], -1, width) @ key.transpose(2, 3) * scaling  # (B, H / G, G, S)
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        weights = scores.softmax(-1, dtype=numbers).to(query.dtype).reshape(lanes, heads, -1)  # (B, H, S)
        self._sum, self._layers = self._sum + weights.mean(1), self._layers + 1


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
    row, own = more.pop("attended"), more.pop("own")
    row.see(query, key, more["scaling"], torch.float32 if own == "eager" else torch.promote_types(query.dtype, torch.float32))
    function: Any = sys.modules[type(module).__module__].eager_attention_forward if own == "eager" else sdpa_attention_forward
    return function(module, query, key, value, attention_mask, **more)


AttentionInterface.register(NAME, _attend)


@contextmanager
def through(config: Any, row: Row) -> Iterator[dict[str, Any]]:
    """Routes a text model's attention through ``row``; gives the further arguments of its forward."""
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield {"attended": row, "own": own}
    finally:
        config._attn_implementation = own
