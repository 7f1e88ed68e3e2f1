"""Stage one: imitation of what was said in a run, on sampled ids alone.

What is imitated is chosen by a plain function of a row: everything of an oracle's run, only the dialogues that ended in the right answer of
one's own (rejection sampling). The loss falls on sampled ids as they were sampled; prompts, pictures, the other role's words and tool
results are read but never learned. A run that cannot be trained on says why instead of training on less.

The result is a checkpoint folder like any other: ``load_policy`` seats it, ``--questioner FOLDER`` plays with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from monologue.backends.checkpoints import open_checkpoint, save_checkpoint
from monologue.backends.inputs import Inputs
from monologue.backends.tokens import tokenizer_hash
from monologue.traces.store import RunReader
from monologue.training.collate import Batch, Collate, sampled_logprobs
from monologue.training.loop import RowTrainer, arguments
from monologue.training.losses import imitation
from monologue.training.recipe import follow
from monologue.training.rows import Counts, Row, RowError, ordered, read_rows, same_ids


class Imitation(BaseModel):
    """A recipe of this stage."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["imitate"] = "imitate"
    """The stage."""
    run: str
    """Folder of the run to imitate."""
    role: str
    """Whose words."""
    model: str = "starter"
    """Checkpoint to begin with: a folder, a Hub name, or ``starter``."""
    keep: Literal["all", "solved"] = "all"
    """Which rows."""
    steps: int = Field(300, ge=1)
    """Optimizer steps."""
    batch: int = Field(16, ge=1)
    """Rows a step."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Of the order of rows."""

    @classmethod
    def read(cls, recipe: dict[str, Any]) -> Imitation:
        """Raises RecipeError that names the keys at fault."""
        return follow(cls, recipe, "imitate")


def imitate(
    run: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    role: str,
    steps: int,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    keep: Callable[[Row], bool] = lambda row: True,
    dtype: str = "float32",
    **more: Any,
) -> dict[str, Any]:
    """Trains the checkpoint ``source`` on what ``role`` said in ``run`` and writes it to ``out``; returns counts and the loss curve.

    ``more`` are further ``TrainingArguments``. Raises RunError, RowError, BackendError, PictureError.
    """
    checkpoint = open_checkpoint(str(source), device="cpu", dtype=getattr(torch, dtype))
    inputs, reader, counts = Inputs(checkpoint), RunReader(run), Counts()
    rows = chosen(read_rows(reader, roles=[role], counts=counts), keep, role, checkpoint.tokenizer, counts)

    def loss(model: Any, found: Batch, count: float) -> torch.Tensor:
        return imitation(sampled_logprobs(model, found, inputs.banned, plain=True), found.trained.to(model.device), count)

    model = checkpoint.model.requires_grad_(True)
    settings = arguments(Path(out), steps=steps, batch=batch, lr=lr, seed=seed, **more)
    trainer = RowTrainer(model, rows, Collate(inputs, reader.picture), loss, settings)
    trainer.train()
    save_checkpoint(checkpoint, out, trainer.accelerator.unwrap_model(trainer.model))
    report = {
        "role": role,
        "rows": len(rows),
        "sampled": sum(sum(row.mask) for row in rows),
        "skipped": dict(counts.skipped),
        "curve": [{"step": line["step"], "loss": line["loss"]} for line in trainer.state.log_history if "loss" in line],
    }
    (Path(out) / "imitate.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def chosen(rows: Iterable[Row], keep: Callable[[Row], bool], role: str, tokenizer: Any, counts: Counts | None = None) -> list[Row]:
    """The rows to imitate. Raises RowError where there are none or where they speak another tokenizer's ids."""
    found = ordered(row for row in rows if keep(row))
    if not found:
        passed = "".join(f"; passed over: {count} x {cause}" for cause, count in (counts or Counts()).skipped.items())
        advice = "look at its roles and scores with 'monologue view'; words without ids of a student's take --retokenize"
        raise RowError(f"the run has nothing of the role {role!r} to imitate{passed}; {advice}")
    same_ids(found, tokenizer_hash(tokenizer))
    return found
