"""Patches embedded by one matrix product.

Towers of the Qwen-VL kind are given pictures that the processor has cut into patches already, and embed them with a three-dimensional
convolution whose kernel is one whole patch. Each output is then a product of a flattened patch and a flattened kernel. Computed as a
convolution it takes three to four times as long on a CPU core, with gradients 2.7 to 3.9 times, which makes a whole tower 1.05 to 1.35
times as slow (``bench/patches.py``). The weights, their names and their shapes stay; sums are taken in another order, so the last bits
differ.

Shapes: N patches, C channels, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class PatchProduct(nn.Conv3d):
    """A convolution without overlap or margin, which multiplies where its input is one kernel large."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *kernel) to (N, D, 1, 1, 1); larger inputs are convolved as ever."""
        if tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def multiply_patches(model: Any) -> Any:
    """The model, its patch convolutions replaced in place by products with the same weights."""
    for module in model.modules():
        if type(module) is nn.Conv3d and _tiles(module):
            module.__class__ = PatchProduct
    return model


def _tiles(module: nn.Conv3d) -> bool:
    return module.stride == module.kernel_size and module.groups == 1 and module.padding == (0, 0, 0) and module.dilation == (1, 1, 1)
