"""The policies under training, one a role, with their critics, as one torch module.

Two roles may be two different base models. They are one module so that one loop, one optimizer object and one checkpoint hold them; nothing
is shared between them: each role has its own parameter groups, learning rate and gradient clipping.

Dropout is off while policies are reinforced: log-probs under dropout are those of another policy than the one that sampled, and the gate
would rightly refuse them.

Shapes: S sampled ids, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monologue.backends.checkpoints import Checkpoint, open_checkpoint, save_checkpoint, take_weights
from monologue.backends.inputs import Inputs
from monologue.training.adapters import Lora, adapt, load_adapter, merged, save_adapter
from monologue.training.collate import Batch, Scored, score
from monologue.training.sharding import shard, whole

CRITICS = "critics.safetensors"


@dataclass(frozen=True)
class Learner:
    """A role's checkpoint and how it is fed."""

    checkpoint: Checkpoint
    """Model, tokenizer, image processor."""
    inputs: Inputs
    """What the engine that samples is fed, too."""
    adapted: bool = False
    """Only adapters are trained."""
    sharded: bool = False
    """The weights are shared out among processes."""

    @classmethod
    def open(cls, source: str, *, device: str = "cpu", dtype: str = "float32", lora: Lora | None = None) -> Learner:
        """A folder or Hub name, all of its weights to be trained, or adapters beside them. Raises BackendError, RecipeError."""
        checkpoint = open_checkpoint(source, device=device, dtype=getattr(torch, dtype))
        inputs = Inputs(checkpoint)
        if lora is None:
            checkpoint.model.requires_grad_(True)
        else:
            adapt(checkpoint.model, lora)
        return cls(checkpoint, inputs, lora is not None)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What has a gradient."""
        return [one for one in self.checkpoint.model.parameters() if one.requires_grad]

    def save(self, folder: Path, main: bool = True) -> None:
        """A whole checkpoint, adapters added in. Where weights are sharded all processes must call this; ``main`` writes."""
        weights = merged(self.checkpoint.model) if self.adapted else None
        if self.sharded:
            weights = whole(self.checkpoint.model.state_dict())
        if main:
            save_checkpoint(self.checkpoint, folder, weights=weights)

    def keep(self, folder: Path, main: bool = True) -> None:
        """What ``save`` writes, and what a resume needs beside it."""
        self.save(folder, main)
        if self.adapted and main:
            save_adapter(self.checkpoint.model, folder)

    def load(self, folder: Path) -> None:
        """What ``keep`` wrote. Raises BackendError."""
        if self.adapted:
            load_adapter(self.checkpoint.model, folder)
        else:
            take_weights(self.checkpoint.model, str(folder))


class Policies(nn.Module):
    """Models by role, and a value head for each role with a critic."""

    def __init__(self, learners: Mapping[str, Learner], critics: Collection[str] = ()) -> None:
        super().__init__()
        self.learners = dict(learners)
        self.models = nn.ModuleDict({role: learner.checkpoint.model for role, learner in learners.items()})
        self.critics = nn.ModuleDict({role: _head(learners[role].checkpoint.model) for role in critics})
        self.train(False)

    def shard(self) -> None:
        """Shares out all weights among processes. Raises RecipeError where there is one alone."""
        shard(self.models.values(), self)
        self.learners = {role: replace(learner, sharded=True) for role, learner in self.learners.items()}

    def train(self, mode: bool = True) -> Policies:
        """Always in evaluation mode: no dropout."""
        super().train(False)
        return self

    def forward(self, role: str, batch: Batch, entropies: bool = False) -> tuple[Scored, Tensor | None]:
        """Log-probs of the sampled ids, and the critic's values (S,) float32 where the role has one."""
        critic = role in self.critics
        scored = score(self.models[role], batch, self.learners[role].inputs.banned, entropies=entropies, states=critic)
        if not critic or scored.states is None:
            return scored, None
        return scored, self.critics[role](scored.states.float()).squeeze(-1)

    @property
    def sharded(self) -> bool:
        return any(learner.sharded for learner in self.learners.values())

    def save(self, folder: Path, main: bool = True) -> None:
        """A checkpoint for each role, and the critics. Where weights are sharded all processes must call this; ``main`` writes."""
        if not main and not self.sharded:
            return
        for role, learner in self.learners.items():
            learner.keep(folder / role, main)
        critics = whole(self.critics.state_dict()) if self.critics else {}
        if critics and main:
            save_file(critics, folder / CRITICS)

    def load(self, folder: Path) -> None:
        """What ``save`` wrote, unless weights are shared out: then they were loaded before. Raises BackendError."""
        if self.sharded:
            return
        for role, learner in self.learners.items():
            learner.load(folder / role)
        if self.critics:
            self.critics.load_state_dict(load_file(folder / CRITICS))


def _head(model: Any) -> nn.Linear:
    """One linear layer that begins by predicting 0."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
