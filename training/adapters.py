"""Low-rank adapters (Hu et al. 2021, by ``peft``): the checkpoint's weights stay, a few small matrices beside them are trained.

The layers are put into the model in place, so whatever scores, feeds or samples it needs to know nothing of them. What leaves the training
is a whole checkpoint with the adapters added in: an engine loads it like any other, and the gate proves it. For a resume only the small
matrices are kept. Dropout is left out: reinforcement scores without it. Left out too: quantised base weights, and a start that is the
same weights with adapters switched off (it is a copy).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from monologue.training.recipe import RecipeError

FILE = "adapter.safetensors"
NAME = "default"


class Lora(BaseModel):
    """Size and place of the adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1)
    """Columns of the small matrices; IMMO's 16."""
    alpha: float = Field(default=32.0, gt=0)
    """The product of the matrices counts alpha / rank; IMMO's 32."""
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """Linear layers that get adapters, by the end of their names."""


def adapt(model: Any, lora: Lora, seed: int = 0) -> None:
    """Puts adapters that add nothing yet into the model, to be the only weights with a gradient. Raises RecipeError without peft and where
    no layer is a target.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise RecipeError("adapters need the library 'peft'; pip install 'monologue[lora]', or leave 'lora' out of the recipe") from error
    import torch

    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.targets, "lora_dropout": 0.0}
    config = peft.LoraConfig(**settings)
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    except ValueError as error:
        raise RecipeError(f"expected lora.targets that are ends of linear layers' names, got {lora.targets!r}; {error}") from error


def merged(model: Any) -> dict[str, Tensor]:
    """The model's weights with the adapters added in, under the names that they had before; what is added lies in the host's memory."""
    found = {name.replace(".base_layer.", "."): value.detach() for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and NAME in layer.lora_A:
            place = f"{name}.weight"
            found[place] = (found[place] + layer.get_delta_weight(NAME).detach().to(found[place])).cpu()
    return found


def save_adapter(model: Any, folder: Path) -> None:
    """The trained matrices alone."""
    save_file({name: value.detach().contiguous() for name, value in model.named_parameters() if value.requires_grad}, folder / FILE)


def load_adapter(model: Any, folder: Path) -> None:
    """What ``save_adapter`` wrote."""
    own = dict(model.named_parameters())
    for name, value in load_file(folder / FILE).items():
        own[name].data.copy_(value)
