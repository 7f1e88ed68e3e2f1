"""The one training loop: rows through ``transformers.Trainer``, which brings optimizer, schedule, accumulation, resume, sharding, trackers.

``RowTrainer`` goes through rows that are there already (imitation), ``StreamTrainer`` through micro-batches that are made on the way.

What we add is exactness. The loss of a step is a sum over sampled ids divided by the number of trained ids in the *whole* step, all
accumulated batches and all processes together; ``Trainer`` counts them from ``labels``, which therefore hold the trained ids and nothing
else. So one batch of 32, four of 8, and two processes of 16 take the same step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, integrations
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from monologue.training.collate import Batch, Collate
from monologue.training.policies import Learner
from monologue.training.recipe import RecipeError
from monologue.training.rows import Row
from monologue.training.sharding import gathered, shared_out

_integrations: Any = integrations
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


class _KeptTrainer(Trainer):
    """``Trainer`` whose checkpoints hold a policy as we write it, adapters apart where there are any."""

    keep: Callable[[Path, bool], None]
    """Every process calls it, with whether it is the one to write."""
    load: Callable[[Path], None]
    """Takes up what ``keep`` wrote."""

    def begin(self, checkpoint: Path | None, *results: Path) -> None:
        """Trains, on from a checkpoint where one is given. After the last step nothing is left, and the ``Trainer`` would say so in its own
        words or take another one; ``results`` is where they will lie.
        """
        state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if checkpoint is None or state is None or state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        self.load(checkpoint)
        self.state = state
        if self.args.should_save:
            where = " and ".join(str(result) for result in results)
            told = f"this training is finished, all of its {state.global_step} steps were taken before"
            print(f"monologue: {told}; its result is in {where}", file=sys.stderr)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.keep(folder, self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load(Path(resume_from_checkpoint))


class RowTrainer(_KeptTrainer):
    """``Trainer`` over rows with a loss of ours."""

    def __init__(
        self, learner: Learner, rows: Sequence[Row], collate: Collate, loss: Loss, arguments: TrainingArguments, **options: Any
    ) -> None:
        own: dict[str, Any] = {"train_dataset": Rows(rows), "data_collator": lambda some: _step(collate(some))}
        super().__init__(model=learner.checkpoint.model, args=arguments, **own, **options)
        self.keep, self.load = learner.keep, learner.load
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


class StreamTrainer(_KeptTrainer):
    """``Trainer`` over micro-batches that are made while it trains, e.g. by playing with the weights it has just changed.

    Nothing is fetched ahead: a micro-batch is asked for when its step begins. Groups of parameters keep their own gradient clipping,
    since two policies in one step have nothing to do with each other's norms.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[dict[str, Any]],
        stream: Iterable[Any],
        loss: StreamLoss,
        settings: TrainingArguments,
        sharded: bool = False,
        **options: Any,
    ) -> None:
        """``groups``: of an optimizer, each with ``params`` and ``lr``. ``model`` has ``save(folder, main)``, which every process calls and
        ``main`` writes, and ``load(folder)``. ``sharded``: its weights are shared out among processes.
        """
        settings.save_only_model = sharded  # the Trainer refuses to write moments that it has not shared out itself; here we do
        super().__init__(model=model, args=settings, **options)
        settings.save_only_model = False
        self.keep, self.load = model.save, model.load
        self.compute_loss_func = loss  # only its presence matters: losses are divided already, the loop must not divide again
        self.remove_callback(PrinterCallback)
        self._groups, self._stream, self._loss, self._sharded = groups, stream, loss, sharded
        self.lost: list[float] = []
        """Loss of each step since this was last emptied."""

    def get_train_dataloader(self) -> Any:
        """The stream itself."""
        return _Endless(self._stream)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """One micro-batch's part of the step's loss."""
        loss = self._loss(model, inputs["micro"])
        if inputs["first"]:
            self.lost.append(0.0)
        self.lost[-1] += float(loss.detach())
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, but counts are of all of them
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with our groups; each is clipped for itself before a step."""
        if self.optimizer is None:
            most, a = self.args.max_grad_norm, self.args
            self.optimizer = torch.optim.AdamW(
                self._groups, betas=(a.adam_beta1, a.adam_beta2), eps=a.adam_epsilon, weight_decay=a.weight_decay
            )
            self.args.max_grad_norm = 0.0

            def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                for group in optimizer.param_groups:
                    torch.nn.utils.clip_grad_norm_(group["params"], most)

            if most > 0:
                self.optimizer.register_step_pre_hook(clip)
        return self.optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        moments = gathered(self.optimizer.state_dict(), self.args.should_save)
        if self.args.should_save:
            torch.save(moments, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        moments = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(shared_out(moments, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


StreamLoss = Callable[[Any, Any], Tensor]
"""Model and micro-batch; gives its part of the step's loss, divided already."""


class _Endless:
    """What ``Trainer`` takes for a data loader without a length."""

    def __init__(self, stream: Iterable[Any]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)


def _step(batch: Batch) -> dict[str, Any]:
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    trained = batch.trained > 0
    labels[batch.row[trained], batch.column[trained]] = batch.sampled[trained]
    return {"batch": batch, "labels": labels}


def arguments(out: Path, *, steps: int, batch: int, lr: float, seed: int = 0, **more: Any) -> TrainingArguments:
    """TrainingArguments with what every stage of ours shares: warm-up, cosine, clipping, no tracker unless asked for.

    Raises RecipeError for a tracker that is not there.
    """
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
    trackers(more.get("report_to", []))
    own = {"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": lr, "seed": seed, "data_seed": seed}
    return TrainingArguments(str(out), **{**common, **own, **more})


def trackers(named: str | Sequence[str] | None) -> None:
    """Raises RecipeError for a tracker that transformers does not know, or whose library is not installed."""
    wanted, known = [named] if isinstance(named, str) else list(named or ()), sorted(_integrations.INTEGRATION_TO_CALLBACK)
    if wanted in ([], ["all"], ["none"]):
        return
    if unknown := [name for name in wanted if name not in known]:
        raise RecipeError(f"expected trackers of {', '.join(known)} in report_to, got {unknown[0]!r}")
    there = set(_integrations.get_available_reporting_integrations())
    for name, found in (("azure_ml", _integrations.is_azureml_available), ("flyte", _integrations.is_flytekit_available)):
        there |= {name} if found() else set()  # transformers does not name these two among those that are installed
    if missing := [name for name in wanted if name not in there]:
        raise RecipeError(f"the tracker {missing[0]!r} of report_to is not installed here; install its library, or leave it out")
