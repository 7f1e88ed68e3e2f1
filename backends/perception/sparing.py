"""What reading block by block need not do: compute what nobody asks for.

Of a prompt and of a latent step only the last place is read on. Before it the last layer has to make keys and values, but its feed-forward
part, three quarters of its products, makes nothing there that anybody sees. What was left out: its queries and its attention at those
places, which no family lets be taken apart from the outside.

Shapes: B lanes, L places of a block, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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
