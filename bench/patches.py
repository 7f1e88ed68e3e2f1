"""A picture's patches embedded by a matrix product and by transformers' own convolution: the layer alone, and a whole tower.

    python bench/patches.py [--repeats 7] [--json bench/results/patches.json]

Pictures of 112 x 84 pixels, 64 at once, float32, one thread; the towers are the shipped answerer's and one of the shape of Qwen2-VL's with
two of its layers. ``learned``: with gradients. Arms take turns within a repeat; a ratio is the convolution's seconds over the product's.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rollout import spread
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower

from monologue.backends.checkpoints import open_model
from monologue.backends.patches import PatchProduct, multiply_patches
from monologue.seating import starter

PICTURES, GRID = 64, (1, 6, 8)
"""Patches along time, height and width."""


def towers() -> dict[str, Any]:
    """As loaded, so with the product."""
    small = open_model(starter("answerer"), device="cpu", dtype=torch.float32).model.visual
    torch.manual_seed(0)
    shape = Qwen2VLConfig(vision_config={"depth": 2, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536}).vision_config
    wide = multiply_patches(Tower(shape)).eval()
    return {"shipped": small, "Qwen2-VL, 2 of 32 layers": wide}


def convolved(tower: Any, yes: bool) -> None:
    """Gives the tower one or the other way of the same layer."""
    tower.patch_embed.proj.__class__ = torch.nn.Conv3d if yes else PatchProduct


def runs(tower: Any) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    pixels = torch.randn(PICTURES * GRID[1] * GRID[2], tower.patch_embed.proj.weight[0].numel())
    grids = torch.tensor([GRID] * PICTURES)

    def learned(layer: Callable[[], torch.Tensor]) -> None:
        tower.requires_grad_(True)
        layer().square().mean().backward()
        tower.zero_grad()

    def embedded() -> torch.Tensor:
        return tower.patch_embed(pixels)  # type: ignore[no-any-return]

    def seen() -> torch.Tensor:
        return tower(pixels, grid_thw=grids).pooler_output  # type: ignore[no-any-return]

    still = torch.no_grad()
    return {
        "layer": still(embedded),
        "layer learned": lambda: learned(embedded),
        "tower": still(seen),
        "tower learned": lambda: learned(seen),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "patches.json")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows, ratio = [], {}
    for name, tower in towers().items():
        for what, run in runs(tower).items():
            found = []
            for repeat in range(-1, chosen.repeats):  # the first is not counted
                seconds = {}
                for arm in ("convolution", "product"):
                    convolved(tower, arm == "convolution")
                    started = time.perf_counter()
                    run()
                    seconds[arm] = round(time.perf_counter() - started, 5)
                if repeat >= 0:
                    found.append(seconds["convolution"] / seconds["product"])
                    rows.append({"tower": name, "what": what, "repeat": repeat, **seconds})
            ratio[f"{name}, {what}"] = spread(found)
            print(f"{name}, {what}: {ratio[f'{name}, {what}']}")
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}, transformers {transformers.__version__}"
    result = {"name": "patches", "command": f"python bench/patches.py --repeats {chosen.repeats}", "machine": machine}
    chosen.json.write_text(json.dumps({**result, "rows": rows, "ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
