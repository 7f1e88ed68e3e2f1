"""The one training loop: rows through ``transformers.Trainer``, which brings optimizer, schedule, accumulation, resume, sharding, trackers.

What we add is exactness. The loss of a step is a sum over sampled ids divided by the number of trained ids in the *whole* step, all
accumulated batches and all processes together; ``Trainer`` counts them from ``labels``, which therefore hold the trained ids and nothing
else. So one batch of 32, four of 8, and two processes of 16 take the same step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from monologue.training.collate import Batch, Collate
from monologue.training.rows import Row

Loss = Callable[[Any, Batch, float], Tensor]
"""Model, batch, number of trained ids in the step; gives the batch's part of the step's loss."""


class Rows(Dataset[Row]):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class RowTrainer(Trainer):
    """``Trainer`` over rows with a loss of ours."""

    def __init__(self, model: Any, rows: Sequence[Row], collate: Collate, loss: Loss, arguments: TrainingArguments, **options: Any) -> None:
        super().__init__(model=model, args=arguments, train_dataset=Rows(rows), data_collator=lambda some: _step(collate(some)), **options)
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self._loss = loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """One batch's part of the step's loss."""
        assert num_items_in_batch is not None
        loss = self._loss(model, inputs["batch"], float(num_items_in_batch))
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, but the count is of all of them
        return (loss, {}) if return_outputs else loss


def _step(batch: Batch) -> dict[str, Any]:
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    trained = batch.trained > 0
    labels[batch.row[trained], batch.column[trained]] = batch.sampled[trained]
    return {"batch": batch, "labels": labels}


def arguments(out: Path, *, steps: int, batch: int, lr: float, seed: int = 0, **more: Any) -> TrainingArguments:
    """TrainingArguments with what every stage of ours shares: warm-up, cosine, clipping, no tracker unless asked for."""
    common: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": not sys.stderr.isatty(),
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    own = {"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": lr, "seed": seed, "data_seed": seed}
    return TrainingArguments(str(out), **{**common, **own, **more})
