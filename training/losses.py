"""Losses, corrections and advantages as pure functions of tensors: nothing is looked up, nothing remembered.

Every loss is a sum over sampled ids divided by a count that is given, never by a count of the tensors at hand: so cutting rows in two,
another batch size, or gradient accumulation changes neither loss nor gradient (``tests/test_training_losses.py`` holds it to 1e-6).

An objective is a *coefficient* for each sampled id, fixed when an update begins, and one of two differentiable forms:

    imitation   -sum(c log p)                                       imitate, filter, topr, awr
    surrogate   -sum(min(r c, clip(r, 1-low, 1+high) c)), r = p/p_old     grpo, ppo (Schulman et al. 2017; asymmetric clip: DAPO 2025)

Importance weights, masks and baselines are never differentiated, so they belong into the coefficient. Whatever speaks of a whole sequence
(``unit``: a stream, in however many rows) is thus computed once over all rows and cannot depend on how they are cut.

Sources: truncated importance ratio and effective sample size, verl ``rollout_corr_helper``; sequence mask, DeepSeek-V3.2; TOPR, Le Roux et
al. 2025 (arXiv 2503.14286); AWR, Peng et al. 2019; GAE, Schulman et al. 2016; adaptive KL, Ziegler et al. 2019 (IMMO's, by TRL's defaults).

Shapes: S sampled ids, U units (streams).
"""

from __future__ import annotations

import torch
from torch import Tensor


def imitation(logprobs: Tensor, weights: Tensor, count: float) -> Tensor:
    """Negative log-likelihood in nats a trained id: -sum(w log p) / count. ``weights`` (S,) are 0 where no loss may fall."""
    return -(logprobs * weights.to(logprobs)).sum() / count


def surrogate(
    new: Tensor, old: Tensor, weights: Tensor, count: float, *, low: float = 0.2, high: float = 0.28, dual: float | None = 3.0
) -> Tensor:
    """Clipped policy gradient. ``old`` (S,) are the log-probs when the update began. Where a weight is negative, the term is floored at
    ``dual`` times it (Ye et al. 2020), so that one id that has become likely cannot outweigh a batch.
    """
    weights = weights.to(new)
    ratio = (new - old.to(new)).exp()
    gain = torch.minimum(ratio * weights, ratio.clamp(1 - low, 1 + high) * weights)  # (S,)
    if dual is not None:
        gain = torch.where(weights < 0, torch.maximum(gain, dual * weights), gain)
    return -gain.sum() / count


def clipped_share(new: Tensor, old: Tensor, weights: Tensor, *, low: float = 0.2, high: float = 0.28) -> Tensor:
    """Share of the ids with a weight whose ratio the clip holds back: they give no gradient."""
    ratio = (new.detach() - old.to(new)).exp()
    held = ((ratio > 1 + high) & (weights > 0)) | ((ratio < 1 - low) & (weights < 0))
    return held.double().sum() / (weights != 0).sum().clamp(min=1)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, count: float, clip: float = 0.2) -> Tensor:
    """Half the squared error of the critic, the larger of that of the value and of the value moved by ``clip`` at most (PPO2)."""
    near = old + (values - old).clamp(-clip, clip)
    worst = torch.maximum((values - returns) ** 2, (near - returns) ** 2)  # (S,)
    return 0.5 * (worst * mask.to(worst)).sum() / count


def kl_estimate(new: Tensor, reference: Tensor) -> Tensor:
    """(S,) nats at each sampled id: exp(d) - d - 1 with d = log ref - log new. Never negative, unbiased for ids drawn from ``new`` (k3)."""
    gap = reference - new
    return gap.exp() - gap - 1


def importance(old: Tensor, behaviour: Tensor, cap: float = 2.0) -> Tensor:
    """(S,) truncated ratio min(p_old / p_behaviour, cap) of an id between the weights that are trained and those that sampled."""
    return (old - behaviour).exp().clamp(max=cap)


def stale_mask(old: Tensor, behaviour: Tensor, advantages: Tensor, mask: Tensor, unit: Tensor, delta: float = 0.5) -> Tensor:
    """(S,) 0.0 on sequences with a negative advantage that have become unlikely: mean(log p_behaviour - log p_old) > delta nats."""
    drifted = per_unit(behaviour - old, mask, unit) / per_unit(torch.ones_like(old), mask, unit).clamp(min=1)
    bad = per_unit(advantages, mask, unit) < 0
    return (~((drifted > delta) & bad)).to(old)


def sequence_ratio(old: Tensor, behaviour: Tensor, mask: Tensor, unit: Tensor) -> Tensor:
    """(S,) at each id the ratio p_old / p_behaviour of the whole sequence that it is part of."""
    return per_unit(old - behaviour, mask, unit).exp()


def topr(advantages: Tensor, ratio: Tensor) -> Tensor:
    """(S,) tapered off-policy REINFORCE: what was good counts fully, what was bad only as far as it is still likely (ratio capped at 1)."""
    return torch.where(advantages >= 0, advantages, advantages * ratio.clamp(max=1.0))


def awr(advantages: Tensor, temperature: float = 1.0, cap: float = 20.0) -> Tensor:
    """(S,) advantage-weighted regression: min(exp(A / temperature), cap)."""
    return (advantages / temperature).exp().clamp(max=cap)


def effective_share(weights: Tensor) -> float:
    """Effective sample size of importance weights as a share of their number: (sum w)^2 / (n sum w^2). 1.0 where all are equal."""
    total, squares = weights.double().sum(), (weights.double() ** 2).sum()
    return float(total**2 / (len(weights) * squares)) if len(weights) and squares > 0 else 0.0


def gae(rewards: Tensor, values: Tensor, unit: Tensor, discount: float = 1.0, decay: float = 0.95) -> Tensor:
    """(S,) generalised advantages over sampled ids only: within a unit the next sampled id follows, whatever was read in between.

    ``unit`` must be sorted: ids stand in order, stream by stream.
    """
    table, places = _table(unit)  # (U, L)
    rewards, values = _spread(rewards, table, places), _spread(values, table, places)
    after = torch.zeros_like(values[:, 0])
    carried, found = after, torch.zeros_like(values)
    for step in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, step] + discount * after - values[:, step]
        carried = delta + discount * decay * carried
        found[:, step], after = carried, values[:, step]
    return found[table]


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(S,) mean 0 and standard deviation 1 (with n - 1) over what the mask holds, 0.0 elsewhere; zeros where there are not two."""
    kept = values[mask > 0]
    if len(kept) < 2:
        return torch.zeros_like(values)
    return torch.where(mask > 0, (values - kept.mean()) * (kept.var() + 1e-8).rsqrt(), 0.0)


def per_unit(values: Tensor, mask: Tensor, unit: Tensor) -> Tensor:
    """(S,) at each id the sum over its unit of what the mask holds."""
    if not len(unit):
        return values
    sums = values.new_zeros(int(unit.max()) + 1).index_add(0, unit, values * mask.to(values))  # (U,)
    return sums[unit]


def _table(unit: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Where each id goes in a table of units by places, left-justified with zeros behind, and the table's size."""
    _, line, lengths = torch.unique_consecutive(unit, return_inverse=True, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    column = torch.arange(len(unit), device=unit.device) - starts[line]
    return (line, column), (len(lengths), int(lengths.max()))


def _spread(values: Tensor, table: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    return values.new_zeros(size).index_put(table, values)
