"""From logits to the distribution that is really sampled, and from a distribution to a token.

Log-probs are computed in float64 from the model's logits, after bans, temperature, top-k and top-p, in this order, and the
token is the inverse of the cumulative distribution at one uniform number of the request's own stream. So a request draws the
same tokens alone and in any batch, up to the last bits of the logits, and a trainer that applies ``log_distribution`` to its
own logits gets the very log-probs of the rollout. Temperature 0 takes the likeliest token and reports the untempered,
untruncated distribution.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monologue.backends.base import Sampling


def log_distribution(logits: Tensor, samplings: Sequence[Sampling], banned: Sequence[int] = ()) -> Tensor:
    """Log-probs (B, V) in float64; -inf for what can never be sampled. One sampling serves all rows."""
    scores = logits.double()  # (B, V)
    if banned:
        scores = scores.index_fill(-1, torch.tensor(list(banned), device=logits.device), -math.inf)
    scores = scores / _column([sampling.temperature or 1.0 for sampling in samplings], scores)
    if any(sampling.temperature and (sampling.top_k or sampling.top_p < 1) for sampling in samplings):
        scores = _truncate(scores, samplings)
    return scores.log_softmax(-1)


def draw(log_probs: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """One token (B,) each. In float64 a number below 1 times the total stays below the total, so the index is in range."""
    cumulative = log_probs.exp().cumsum(-1)  # (B, V)
    target = _column(uniforms, log_probs) * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    greedy = torch.tensor([sampling.temperature == 0 for sampling in samplings], device=log_probs.device)
    return torch.where(greedy, log_probs.argmax(-1), sampled)


def _truncate(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    size = scores.shape[-1]
    top_k = _column([sampling.top_k if sampling.top_k and sampling.temperature else size for sampling in samplings], scores)
    top_p = _column([sampling.top_p if sampling.top_p < 1 and sampling.temperature else math.inf for sampling in samplings], scores)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    late = torch.arange(size, device=scores.device) >= top_k  # (B, V) by rank
    chances = ordered.masked_fill(late, -math.inf).softmax(-1)
    late = late | (chances.cumsum(-1) - chances >= top_p)
    return scores.masked_fill(torch.zeros_like(late).scatter(-1, order, late), -math.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=like.device).unsqueeze(-1)  # (B, 1)
