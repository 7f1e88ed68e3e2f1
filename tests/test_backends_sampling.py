"""The sampled distribution, by equalities."""

from __future__ import annotations

import math

import pytest
import torch

from monologue.backends.base import Sampling
from monologue.backends.sampling import draw, log_distribution

LOGITS = torch.tensor([[0.0, 2.0, -1.0, 1.0, 2.0]])


def probabilities(**settings: float) -> list[float]:
    return log_distribution(LOGITS, [Sampling(**settings)]).exp()[0].tolist()  # type: ignore[arg-type]


def test_temperature_divides_logits_and_zero_leaves_them() -> None:
    assert probabilities(temperature=2.0) == pytest.approx((LOGITS.double()[0] / 2).softmax(-1).tolist())
    assert probabilities(temperature=0, top_k=1, top_p=0.1) == pytest.approx(LOGITS.double()[0].softmax(-1).tolist())


def test_top_k_keeps_exactly_k_even_among_equals() -> None:
    assert [p > 0 for p in probabilities(top_k=1)] == [False, True, False, False, False]
    assert probabilities(top_k=2) == pytest.approx([0, 0.5, 0, 0, 0.5])


def test_top_p_keeps_the_smallest_set_that_reaches_p_and_at_least_one() -> None:
    assert [p > 0 for p in probabilities(top_p=1e-9)] == [False, True, False, False, False]
    full = LOGITS.double()[0].softmax(-1)
    assert [p > 0 for p in probabilities(top_p=float(full[1] * 2 + full[3] / 2))] == [False, True, False, True, True]
    assert sum(probabilities(top_p=0.5)) == pytest.approx(1.0)


def test_rows_have_their_own_rules_and_banned_ids_have_no_chance() -> None:
    mixed = log_distribution(LOGITS.repeat(3, 1), [Sampling(top_k=1), Sampling(), Sampling(top_p=0.6)], banned=(1,)).exp()
    assert mixed[:, 1].tolist() == [0, 0, 0] and mixed[0].tolist() == [0, 0, 0, 0, 1]
    assert [int((row > 0).sum()) for row in mixed] == [1, 4, 1]


def test_drawing_inverts_the_cumulative_distribution_and_never_leaves_the_support() -> None:
    sampling = Sampling(top_k=3)
    log_probs = log_distribution(LOGITS, [sampling])
    grid = [place / 4000 for place in range(4000)] + [1 - 2**-53]
    tokens = draw(log_probs.expand(len(grid), -1), [sampling] * len(grid), grid)
    for token, share in enumerate(log_probs.exp()[0].tolist()):
        assert math.isclose(float((tokens == token).double().mean()), share, abs_tol=1e-3)
    assert int(tokens[-1]) == 4
    assert int(draw(log_probs, [Sampling(temperature=0)], [0.999])) == 1
