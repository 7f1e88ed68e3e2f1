"""Losses as pure functions of log-probs: tensors in, a scalar out, nothing looked up.

Every loss is a sum over sampled ids divided by a count that is given, never by a count of the tensors at hand: so cutting rows in two,
another batch size, or gradient accumulation changes neither loss nor gradient (``tests/test_training_rows.py`` holds it to 1e-6).

Shapes: S sampled ids.
"""

from __future__ import annotations

from torch import Tensor


def imitation(logprobs: Tensor, weights: Tensor, count: float) -> Tensor:
    """Negative log-likelihood in nats a trained id: -sum(w log p) / count. ``weights`` (S,) are 0 where no loss may fall."""
    return -(logprobs * weights.to(logprobs)).sum() / count
