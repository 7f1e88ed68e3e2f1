"""Weights shared out among processes, each layer gathered when it is needed (FSDP2: ``torch.distributed.fsdp.fully_shard``).

    accelerate launch --multi_gpu --num_processes 8 -m monologue train reinforce RECIPE --set shard=true

Layers are cut where the model says that it must not be split; gradients and the optimizer's moments are shared out with them. The engine
that plays, and whoever resumes or uses the result, wants whole weights: all processes gather them (``whole``), one writes. Moments are
written whole too (``gathered``). We shard by ourselves: accelerate's own way leaves processes without a GPU unsharded without a word.

Left out, and refused: adapters. The weights of the start, kept for the KL, are whole in every process; ``reference = false`` saves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from monologue.training.recipe import RecipeError


def shard(models: Iterable[nn.Module], rest: Any) -> None:
    """Shares out the weights of some models, and of what else the module ``rest`` around them holds, in place, among the processes that
    were launched. Raises RecipeError where there is one alone.
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise RecipeError("shard=true wants several processes, got one; start it with 'accelerate launch' or 'torchrun'")
    mesh = init_device_mesh(next(rest.parameters()).device.type, (dist.get_world_size(),))
    for model in models:
        layers = set(getattr(model, "_no_split_modules", None) or ())
        for module in model.modules():
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    fully_shard(rest, mesh=mesh)
    rest.is_distributed_loading_by_transformers = True  # so the Trainer neither wraps nor moves it


def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight in one piece, on the CPU. All processes must ask for the same ones at once. In the first one tied weights stay tied."""
    found: dict[int, Tensor] = {}
    gathered = {}
    for name, value in weights.items():
        mine = value.to_local() if isinstance(value, DTensor) else value
        tensor = (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        gathered[name] = found.setdefault(mine.data_ptr(), tensor) if mine.numel() else tensor
    return gathered


def gathered(state: Any, main: bool) -> Any:
    """An optimizer's ``state_dict`` in one piece, on the CPU of the ``main`` process. All must ask at once; others keep nothing."""
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if main else None
    if isinstance(state, dict):
        return {key: gathered(value, main) for key, value in state.items()}
    return state


def shared_out(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """What ``gathered`` gave, one moment after another, as each process's share of the optimizer's weights. All must ask at once."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def share(value: Any, weight: Any) -> Any:
        if not isinstance(weight, DTensor) or value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)

    held = {place: {name: share(value, weights[place]) for name, value in moments.items()} for place, moments in state["state"].items()}
    return {**state, "state": held}
