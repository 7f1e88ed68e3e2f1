"""Patches by a product are patches by a convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from monologue.backends.checkpoints import open_model
from monologue.backends.patches import PatchProduct, multiply_patches
from monologue.seating import starter


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=bias, dtype=torch.float64)
    product = multiply_patches(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(product) is PatchProduct and list(product.state_dict()) == list(plain.state_dict())
    patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64)
    found = [layer(patches) for layer in (plain, product)]
    assert found[0].shape == found[1].shape == (7, 5, 1, 1, 1)
    torch.testing.assert_close(found[1], found[0], atol=1e-13, rtol=0)
    for one in found:
        one.sin().sum().backward()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(product.get_parameter(name).grad, weight.grad, atol=1e-12, rtol=0)


def test_what_is_larger_than_a_patch_is_convolved() -> None:
    layer = multiply_patches(nn.Sequential(nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4))))[0]
    video = torch.randn(1, 3, 4, 8, 8)
    torch.testing.assert_close(layer(video), nn.functional.conv3d(video, layer.weight, layer.bias, stride=(2, 4, 4)))
    assert layer(video).shape == (1, 5, 2, 2, 2)


@pytest.mark.parametrize("told", [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "groups": 2}, {"stride": 2, "dilation": 2}])
def test_other_convolutions_stay_as_they_are(told: dict[str, int]) -> None:
    layer = nn.Conv3d(4, 4, 2, **told)
    assert type(multiply_patches(nn.Sequential(layer))[0]) is nn.Conv3d


def test_a_loaded_tower_multiplies_and_keeps_its_weights_names() -> None:
    model = open_model(starter("answerer"), device="cpu", dtype=torch.float32)
    assert isinstance(model.model.visual.patch_embed.proj, PatchProduct)
    assert "model.visual.patch_embed.proj.weight" in model.state_dict()
