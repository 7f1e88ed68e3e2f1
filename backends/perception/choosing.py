"""Which patches a latent step reads again.

Scores come as one attention row; choosing is a top-k over the places that are there and, unless patches may be reused, not yet taken.
It carries no gradient. A lane with fewer patches left than wanted takes those it has: -1 stands for an empty place, after the real ones.

Shapes: B lanes, J patches of the lane with most, K patches a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monologue.backends.base import RequestRefused
from monologue.backends.perception.modes import Mode


class Choice:
    """What is still free to be chosen in each lane. ``there`` (B, J) bool; ``seeds`` make a fair draw the same alone and in any batch."""

    def __init__(self, mode: Mode, there: Tensor, seeds: Sequence[int] | None) -> None:
        self._mode, self._there = mode, there
        self.free = there.clone()
        self._dice = [torch.Generator().manual_seed(seed) for seed in seeds or ()]

    def choose(self, scores: Tensor | None, step: int, alive: Tensor) -> Tensor:
        """(B, K) indices from 0 among a lane's patches, by ``scores`` (B, J) or by a draw; only lanes ``alive`` (B,) need have enough of
        them. Raises RequestRefused.
        """
        if self._mode.patches == "random":
            scores = self._draws()
        assert scores is not None, "attention was asked for before"
        self._refuse_scarce(step, alive)
        k = self._mode.k
        if self._mode.arrangement == "released":
            lines = [line[there].topk(k, sorted=False).indices for line, there in zip(self._masked(scores), self._there, strict=True)]
            return torch.stack(lines)
        width = min(k, self.free.shape[1])
        best = self._masked(scores).topk(width, dim=1)
        after = self.free.shape[1]
        found = best.indices.masked_fill(best.values == -torch.inf, after).sort(dim=1).values  # (B, width), empty ones last
        return torch.nn.functional.pad(found.masked_fill(found == after, -1), (0, k - width), value=-1)

    def take(self, chosen: Tensor) -> None:
        """Marks patches as used. Raises RequestRefused for an index that a lane does not have."""
        sizes = self._there.sum(1)  # (B,)
        if bool(((chosen >= sizes.unsqueeze(1)) | (chosen < -1)).any()):
            raise RequestRefused(f"expected chosen patches below {sizes.tolist()} by lane, or -1 for none, got {chosen.tolist()!r}")
        if not self._mode.reuse and self.free.shape[1]:
            hits = torch.zeros_like(self.free, dtype=torch.long)
            self.free = self.free & (hits.scatter_add(1, chosen.clamp(min=0), (chosen >= 0).long()) == 0)

    def _draws(self) -> Tensor:
        """(B, J) uniform numbers; a lane draws as many as it has patches, so its neighbours change nothing."""
        if len(self._dice) != len(self.free):
            raise ValueError(f"random patches need one seed for each of {len(self.free)} lanes, got {len(self._dice)}")
        sizes, width = self._there.sum(1).tolist(), self.free.shape[1]
        drawn = [torch.rand(size, generator=dice, dtype=torch.float64) for size, dice in zip(sizes, self._dice, strict=True)]
        return torch.stack([torch.nn.functional.pad(line, (0, width - len(line))) for line in drawn]).to(self.free.device)

    def _masked(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.free, -torch.inf)

    def _refuse_scarce(self, step: int, alive: Tensor) -> None:
        left = int(self.free.sum(1)[alive].min())
        if self._mode.scarce == "refuse" and left < self._mode.k:
            raise RequestRefused(f"expected {self._mode.k} free patches a lane at step {step}, got {left}; lower k, or scarce='fewer'")
