"""Keys and values with room for more are those that are joined anew each time, whatever is done to them on the way."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from monologue.backends.kept import Kept, empty, roomy


def test_whatever_is_done_to_it_it_holds_what_a_joined_one_holds() -> None:
    for seed in range(20):
        ours, theirs, lanes = empty(), DynamicCache(), 4
        dice, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
        kept: list[Any] = []
        for _ in range(12):
            new = torch.randn(2, lanes, 2, dice.choice((1, 1, 1, 5)), 3, generator=numbers)
            with dice.choice((torch.no_grad, torch.enable_grad, torch.inference_mode))():
                found, wanted = ours.update(new[0], new[1], 0), theirs.update(new[0], new[1], 0)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
            kept.append((found, [one.clone() for one in wanted]))
            if dice.random() < 0.3:
                places = torch.tensor([dice.randrange(lanes) for _ in range(dice.randint(1, 5))])
                lanes = len(places)
                for cache in (ours, theirs):
                    cache.batch_select_indices(places)
        assert all(torch.equal(one, other) for pair in kept for one, other in zip(*pair, strict=True)), "what was given out stays as it was"


@torch.no_grad()
def test_who_leaves_takes_the_buffer_along() -> None:
    cache = empty()
    for _ in range(2):
        cache.update(torch.randn(3, 2, 8, 3), torch.randn(3, 2, 8, 3), 0)
    room = weakref.ref(cache.layers[0].keys.untyped_storage())
    cache.batch_select_indices(torch.tensor([2]))
    assert room() is None and cache.layers[0].keys.untyped_storage().nbytes() == 2 * 16 * 3 * 4


@torch.no_grad()
def test_words_are_written_behind_what_is_kept() -> None:
    cache, places = empty(), list[int]()
    for _ in range(40):
        keys, _ = cache.update(torch.randn(2, 2, 1, 3), torch.randn(2, 2, 1, 3), 0)
        places.append(keys.data_ptr())
    assert len(set(places)) < 12


def test_gradients_reach_what_was_joined() -> None:
    cache, first, second = empty(), torch.randn(1, 1, 2, 3, requires_grad=True), torch.randn(1, 1, 2, 3, requires_grad=True)
    cache.update(first, first, 0)
    keys, values = cache.update(second, second, 0)
    (keys * values).sum().backward()  # type: ignore[no-untyped-call]
    for one in (first, second):
        assert one.grad is not None and torch.equal(one.grad, 2 * one.detach())


def test_layers_that_forget_stay_as_they_are() -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(
        num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], sliding_window=4, use_sliding_window=True
    )
    kinds = [type(layer) for layer in roomy(DynamicCache(config=config)).layers]
    assert kinds[0] is Kept and kinds[1] is not Kept and kinds[1] is not DynamicLayer


@pytest.mark.parametrize("other", [None, ()])
def test_what_is_no_cache_of_layers_is_given_back(other: Any) -> None:
    assert roomy(other) is other and isinstance(empty(), Cache)
