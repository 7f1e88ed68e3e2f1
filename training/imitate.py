"""Stage one: imitation of what was said in a run, on sampled ids alone.

What is imitated is chosen by a plain function of a row: everything of an oracle's run, only the dialogues that ended in the right answer of
one's own (rejection sampling). The loss falls on sampled ids as they were sampled; prompts, pictures, the other role's words and tool
results are read but never learned. A run that cannot be trained on says why instead of training on less.

The result is a checkpoint folder like any other: ``load_policy`` seats it, ``--questioner FOLDER`` plays with it. A killed training goes on
from its last checkpoint with the losses of an unbroken one, bit for bit on a CPU. Left out: weights shared out among processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from monologue.backends.places import UNKNOWN
from monologue.backends.tokens import tokenizer_hash
from monologue.traces.store import RunReader
from monologue.training.claims import STATE, claim, latest, taken
from monologue.training.collate import Batch, Collate, sampled_logprobs
from monologue.training.imitation import Imitation
from monologue.training.loop import Loss, RowTrainer, arguments
from monologue.training.losses import imitation
from monologue.training.policies import Learner
from monologue.training.recipe import RecipeError
from monologue.training.rows import Counts, Row, RowError, ordered, read_rows, same_ids


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
    resume: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Trains the checkpoint ``source`` on what ``role`` said in ``run`` and writes it to ``out``; returns counts and the loss curve.

    ``resume`` goes on with what a killed training left in ``out``, from its beginning where it left no checkpoint. ``more`` are further
    keys of a recipe (``Imitation``) and ``TrainingArguments``. Raises RecipeError, RunError, RowError, BackendError, PictureError.
    """
    own = {name: more.pop(name) for name in Imitation.model_fields.keys() & more.keys()}
    given = {"role": role, "steps": steps, "batch": batch, "lr": lr, "seed": seed, "dtype": dtype, **own}
    recipe, out = Imitation.read({"run": str(run), "model": str(source), **given}), Path(out)
    settings = _settings(recipe, out, more)
    if settings.should_save:
        claim(recipe.settled(), out, resume)
    reader, counts = RunReader(run), Counts()
    learner = Learner.open(recipe.model, device=str(settings.device), dtype=recipe.dtype, lora=recipe.lora)
    rows = chosen(read_rows(reader, roles=[role], counts=counts), keep, role, learner.checkpoint.tokenizer, counts)
    settled = recipe.settled(start=_start(learner), rows=fingerprint(rows))
    if settings.should_save:
        claim(settled, out, resume)
    with taken(settled, out) if settings.should_save else nullcontext():
        trainer = RowTrainer(learner, rows, Collate(learner.inputs, reader.picture), _loss(learner), settings)
        trainer.begin(latest(out / STATE) if resume else None, out)
    learner.save(out, settings.should_save)
    report = {
        "role": role,
        "rows": len(rows),
        "sampled": sum(sum(row.mask) for row in rows),
        "skipped": dict(counts.skipped),
        "curve": [{"step": line["step"], "loss": line["loss"]} for line in trainer.state.log_history if "loss" in line],
    }
    if settings.should_save:
        (out / "imitate.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _loss(learner: Learner) -> Loss:
    def loss(model: Any, found: Batch, count: float) -> torch.Tensor:
        logprobs = sampled_logprobs(model, found, learner.inputs.banned, plain=True)
        return imitation(logprobs, found.trained.to(logprobs.device), count)

    return loss


def _settings(recipe: Imitation, out: Path, more: Mapping[str, Any]) -> TrainingArguments:
    """Raises RecipeError for what cannot be honoured here."""
    processes = PartialState(cpu=recipe.device == "cpu").num_processes
    if recipe.batch % (recipe.accumulation * processes):
        told = f"accumulation={recipe.accumulation} micro-batches in each of {processes} processes"
        raise RecipeError(f"expected a batch that can be shared out evenly to {told}, got batch={recipe.batch}")
    point = max(1, int(more.get("logging_steps", recipe.steps // 20)))
    own = {
        "gradient_accumulation_steps": recipe.accumulation,
        "bf16": recipe.mixed == "bfloat16",
        "logging_steps": point,
        "save_strategy": "steps",
        "save_steps": -(-recipe.save_every // point) * point,
        "save_total_limit": 2,
        "report_to": recipe.report_to,
        "use_cpu": recipe.device == "cpu",
    }
    share = recipe.batch // (recipe.accumulation * processes)
    found = arguments(out / STATE, steps=recipe.steps, batch=share, lr=recipe.lr, seed=recipe.seed, **{**own, **more})
    if recipe.device not in (found.device.type, str(found.device)):
        raise RecipeError(f"expected a device that this process can train on, {str(found.device)!r}, got device={recipe.device!r}")
    if found.n_gpu > 1:
        raise RecipeError(f"one process trains on one GPU, got {found.n_gpu}; start one for each by 'accelerate launch', or hide others")
    return found


def _start(learner: Learner) -> str:
    """The weights to begin with, by content where that is known."""
    return learner.checkpoint.source if learner.checkpoint.version == UNKNOWN else learner.checkpoint.version


def fingerprint(rows: Iterable[Row]) -> str:
    """Of everything in the rows that a step depends on."""
    digest = hashlib.sha256()
    for row in rows:
        facts = [row.episode_id, row.stream, row.number, row.ids, list(row.mask), [image.sha256 for image in row.images]]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:16]


def chosen(rows: Iterable[Row], keep: Callable[[Row], bool], role: str, tokenizer: Any, counts: Counts | None = None) -> list[Row]:
    """The rows to imitate. Raises RowError where there are none or where they speak another tokenizer's ids."""
    found = ordered(row for row in rows if keep(row))
    if not found:
        passed = "".join(f"; passed over: {count} x {cause}" for cause, count in (counts or Counts()).skipped.items())
        advice = "look at its roles and scores with 'monologue view'; words without ids of a student's take --retokenize"
        raise RowError(f"the run has nothing of the role {role!r} to imitate{passed}; {advice}")
    same_ids(found, tokenizer_hash(tokenizer))
    return found
