"""The recipe of stage one, as it stands in a TOML file. Keys that stage two has too mean the same there (``reinforcement``)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from monologue.training.adapters import Lora
from monologue.training.recipe import follow

FREE = frozenset(["device", "report_to", "save_every"])
"""Keys that may differ when a training goes on: they say where and under whose eyes, not what a step is."""
TOLD = frozenset(["run", "model", "keep"])
"""Keys that say where rows and weights lie; what must be the same are these themselves."""


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
    """Rows a step, of all processes together."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches a step; changes memory, not the result."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    lora: Lora | None = None
    """Train low-rank adapters in place of all weights, e.g. ``lora = { rank = 16 }``; needs peft. The result has them added in."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the trained weights."""
    mixed: Literal["no", "bfloat16"] = "no"
    """Numbers of the matrix products; weights, optimizer, softmax and loss stay in ``dtype``."""
    device: str = "cpu"
    """Where trained weights live."""
    seed: int = 0
    """Of the order of rows."""
    report_to: list[str] = []
    """Trackers of ``transformers`` that are told of every point of the curve, e.g. tensorboard, wandb."""
    save_every: int = Field(200, ge=1)
    """Steps between checkpoints to resume from, rounded up to a point of the curve: between two its mean would be lost."""

    @classmethod
    def read(cls, recipe: dict[str, Any]) -> Imitation:
        """Raises RecipeError that names the keys at fault."""
        return follow(cls, recipe, "imitate")

    @model_validator(mode="after")
    def _fits(self) -> Imitation:
        if self.mixed != "no" and self.dtype != "float32":
            raise ValueError(f"mixed={self.mixed!r} wants dtype='float32', got dtype={self.dtype!r}")
        if self.batch % self.accumulation:
            raise ValueError(f"batch={self.batch!r} rows cannot be cut into accumulation={self.accumulation!r} equal micro-batches")
        return self

    def settled(self, **found: str) -> dict[str, Any]:
        """What must be the same when a training goes on; ``found`` are the start and the rows, by content."""
        return {**self.model_dump(mode="json", exclude=set(FREE | TOLD)), **found}
