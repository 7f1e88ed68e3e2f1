"""One short loop for the starter policies: Muon on the matrices, AdamW on the rest, warm-up then cosine, a curve on disk.

Muon (orthogonalised momentum) reached the same caption loss in about half the steps of AdamW on these widths; embeddings, norms and
biases stay with AdamW, as its authors advise. Small batches beat large ones here: what has to form is a handful of attention circuits,
and they form per step, not per example. Budgets are steps, not seconds, so a run does not depend on how busy the machine is.
Resume, sharding and mixed precision are not offered: a stage takes minutes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

CLIP = 1.0
FLOOR = 0.02
"""Share of the peak learning rate at which the cosine ends."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One leg of a curriculum."""

    name: str
    steps: int
    batch: int
    """Sequences (or pictures) per step."""
    lr: float = 4e-3
    """Peak learning rate of Muon; AdamW runs at half of it."""
    turns: int = 10
    """Questions per picture."""
    weights: dict[str, float] | None = None
    """Shares of the question kinds."""
    floor: float = FLOOR
    """Share of the peak learning rate at which the stage ends."""
    first: int = 0
    """Index of the first training problem, so that a later stage meets new ones."""


class Curve:
    """Append-only JSON lines: one per report, one per examination."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(self, **facts: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(facts) + "\n")


def optimizers(parameters: list[tuple[str, nn.Parameter]], lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in parameters if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in parameters if id(p) not in taken]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=4)
    return [muon, torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0)]


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Rounds every weight to bfloat16, in place; arithmetic stays in float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16).float())


def schedule(step: int, steps: int, floor: float) -> float:
    """Linear warm-up over 50 steps, then a cosine down to ``floor``."""
    return min(1.0, (step + 1) / 50) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(
    stage: Stage,
    parameters: list[tuple[str, nn.Parameter]],
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    curve: Curve,
    examine: Callable[[], dict[str, Any]] | None = None,
    every: int = 1000,
) -> None:
    """Trains ``parameters`` for ``stage.steps`` steps; reports to the curve and, every so often, examines."""
    opts = optimizers(parameters, stage.lr)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    tensors = [p for _, p in parameters]
    started, average = time.monotonic(), math.nan
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(stage.name, total=stage.steps, loss="")
        for step in range(stage.steps):
            share = schedule(step, stage.steps, stage.floor)
            for opt, peak in zip(opts, peaks, strict=True):
                for group, lr in zip(opt.param_groups, peak, strict=True):
                    group["lr"] = lr * share
                opt.zero_grad(set_to_none=True)
            loss = loss_of(next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(tensors, CLIP)
            for opt in opts:
                opt.step()
            average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
            bar.update(row, advance=1, loss=f"loss {average:.3f}")
            last = step + 1 == stage.steps
            if (step + 1) % 100 == 0 or last:
                seconds = round(time.monotonic() - started, 1)
                exam = examine() if examine and ((step + 1) % every == 0 or last) else {}
                curve.add(stage=stage.name, step=step + 1, loss=round(average, 4), seconds=seconds, **exam)
