"""Muon on the matrices, AdamW on the rest, as one optimizer that the training loop can schedule, save and resume.

Muon (orthogonalised momentum) forms the attention circuits of small models in about half the steps of AdamW (``starter.fit``); embeddings,
norms and biases stay with AdamW, as its authors advise, at half the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers behind one face; their parameter groups are this one's, so a schedule of it moves both."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        taken = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in taken]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", ns_steps=4)
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon,)
        if rest:
            self.parts = (muon, torch.optim.AdamW(rest, lr=lr / 2, betas=betas, weight_decay=0.0))
        super().__init__([p for _, p in named], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Of each."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
