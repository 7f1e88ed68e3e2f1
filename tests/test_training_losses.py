"""Losses and advantages equal what TRL and verl publish, written out here anew; estimators find the exact gradient.

The others work on tables (B, T) with a mask, ours on sampled ids in a row (S,); ``flat`` goes from one to the other. Their own code
is compared in ``tests_real/test_trainers.py``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from monologue.training import losses
from monologue.training.objectives import Awr, Experience, Filter, Grpo, Part, Ppo, Topr

B, T = 6, 11
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}


def tables(seed: int) -> dict[str, Tensor]:
    """Shared random tensors (B, T); no row without a sampled id."""
    dice = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=dice, dtype=torch.float64)  # noqa: E731
    mask = (torch.rand(B, T, generator=dice) < 0.7).double()
    mask[:, 0] = 1
    old = -draw(B, T).abs()
    return {
        **{
            "mask": mask,
            "old": old,
            "new": old + 0.5 * draw(B, T),
            "behaviour": old + 0.3 + 0.4 * draw(B, T),
            "reference": old + draw(B, T),
        },
        **{"advantage": draw(B, 1).expand(B, T), "reward": draw(B, T) * mask, "value": draw(B, T), "value_now": draw(B, T)},
    }


def flat(table: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = table["mask"] > 0
    return {name: values[kept] for name, values in table.items()} | {"unit": torch.arange(B).unsqueeze(1).expand(B, T)[kept]}


@pytest.mark.parametrize("seed", range(5))
def test_the_surrogate_is_verls_with_dual_clip_and_rollout_weights(seed: int) -> None:
    t = tables(seed)
    ratio = (t["new"] - t["old"]).exp()
    first = torch.maximum(-t["advantage"] * ratio, -t["advantage"] * ratio.clamp(0.8, 1.28))
    per_token = torch.where(t["advantage"] < 0, torch.minimum(-t["advantage"] * 3.0, first), first)
    per_token = per_token * (t["old"] - t["behaviour"]).exp().clamp(max=2.0)
    theirs = (per_token * t["mask"]).sum() / t["mask"].sum()
    f = flat(t)
    weights = f["advantage"] * losses.importance(f["old"], f["behaviour"], 2.0)
    ours = losses.surrogate(f["new"], f["old"], weights, float(t["mask"].sum()))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_grpo_is_trls_dapo_loss_with_kl_and_off_policy_mask(seed: int) -> None:
    t = tables(seed)
    drift = ((t["behaviour"] - t["old"]) * t["mask"]).sum(1, keepdim=True) / t["mask"].sum(1, keepdim=True)
    limit = 0.9 * float(drift[t["advantage"][:, :1] < 0].max())  # something that is blamed has drifted too far
    assert limit > 0
    keep = ((t["advantage"] >= 0) | (drift <= limit)).double()
    assert keep.mean() < 1
    ratio = (t["new"] - t["old"]).exp()
    per_token = -torch.min(ratio * t["advantage"], ratio.clamp(0.8, 1.28) * t["advantage"]) * keep
    gap = t["reference"] - t["new"]
    theirs = ((per_token + 0.04 * (gap.exp() - gap - 1)) * t["mask"]).sum() / t["mask"].sum()
    f = flat(t)
    objective = Grpo(cap=1e9, delta=limit, dual=None, kl=0.04)
    batch = Experience(f["advantage"], f["reward"], f["mask"], f["unit"], f["behaviour"], f["old"], torch.zeros_like(f["old"]) > 0)
    weighed = objective.weigh(batch, 0.04)
    weights = weighed.coefficients / (f["old"] - f["behaviour"]).exp()  # TRL corrects for staleness by vLLM's log-probs alone
    part = Part(weights, f["old"], f["mask"], f["reference"], None, None)
    torch.testing.assert_close(objective.loss(f["new"], part, float(t["mask"].sum()), None, 0.04), theirs, **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_gae_and_whitening_are_verls(seed: int) -> None:
    """Observation tokens in between are skipped: values and lambda-returns are carried across them."""
    t = tables(seed)
    gamma, lam = 0.97, 0.9
    following = carried = torch.zeros(B, dtype=torch.float64)
    found = torch.zeros(B, T, dtype=torch.float64)
    for step in reversed(range(T)):
        mask = t["mask"][:, step]
        now = t["reward"][:, step] + gamma * following - t["value"][:, step] + gamma * lam * carried
        following = t["value"][:, step] * mask + (1 - mask) * following
        carried = now * mask + (1 - mask) * carried
        found[:, step] = carried
    kept = t["mask"] > 0
    mean = (found * t["mask"]).sum() / t["mask"].sum()
    count = t["mask"].sum()
    spread = (((found - mean) ** 2) * t["mask"]).sum() / count * count / (count - 1)
    f = flat(t)
    ours = losses.gae(f["reward"], f["value"], f["unit"], gamma, lam)
    torch.testing.assert_close(ours, found[kept], **CLOSE)
    torch.testing.assert_close(losses.whiten(ours, f["mask"]), ((found - mean) * (spread + 1e-8).rsqrt())[kept], **CLOSE)


def test_the_critics_loss_is_verls() -> None:
    t = tables(0)
    returns = t["reward"]
    near = torch.max(torch.min(t["value_now"], t["value"] + 0.2), t["value"] - 0.2)
    worst = torch.max((t["value_now"] - returns) ** 2, (near - returns) ** 2)
    theirs = 0.5 * (worst * t["mask"]).sum() / t["mask"].sum()
    f = flat(t)
    ours = losses.value_loss(f["value_now"], f["value"], f["reward"], f["mask"], float(t["mask"].sum()))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_effective_share_is_verls() -> None:
    weights = torch.rand(50, dtype=torch.float64) * 3
    theirs = 1 / ((weights / weights.mean()) ** 2).mean()
    assert losses.effective_share(weights) == pytest.approx(float(theirs), abs=1e-9)
    assert losses.effective_share(torch.ones(9)) == 1.0
    one = torch.zeros(10)
    one[3] = 5.0
    assert losses.effective_share(one) == pytest.approx(0.1)


def test_the_price_of_kl_adapts_as_trls_controller() -> None:
    objective, price = Ppo(kl=0.2, target=6.0, horizon=10_000), 0.2
    for divergence in (0.0, 5.5, 6.0, 7.0, 60.0):
        error = min(max(divergence / 6.0 - 1, -0.2), 0.2)
        assert objective.adapted(price, divergence, 64) == pytest.approx(price * (1 + error * 64 / 10_000), abs=1e-12)
    assert Ppo(target=None).adapted(0.3, 60.0, 64) == 0.3


def test_topr_tapers_blame_and_not_praise() -> None:
    f = flat(tables(3))
    batch = Experience(f["advantage"], f["reward"], f["mask"], f["unit"], f["behaviour"], f["old"], torch.zeros_like(f["old"]) > 0)
    found = Topr().weigh(batch, 0.0).coefficients
    for unit in range(B):
        mine = f["unit"] == unit
        ratio = math.exp(float((f["old"] - f["behaviour"])[mine].sum()))
        blame = bool((f["advantage"][mine] < 0).all())
        torch.testing.assert_close(found[mine], f["advantage"][mine] * (min(ratio, 1.0) if blame else 1.0), **CLOSE)


def test_awr_and_filter_weigh_by_what_was_earned() -> None:
    unit, ones = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.float64)
    earned = torch.tensor([0.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    nothing = torch.full((4,), math.nan, dtype=torch.float64)
    batch = Experience(torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), earned, ones, unit, nothing, -ones, ones > 0)
    assert Filter(least=1.0).weigh(batch, 0.0).coefficients.tolist() == [1, 1, 0, 0]
    spread = math.sqrt(4 / 3)
    expected = [math.exp(1 / spread / 0.5), math.exp(-1 / spread / 0.5)]
    found = Awr(temperature=0.5).weigh(batch, 0.0).coefficients
    torch.testing.assert_close(found[[0, 2]], torch.tensor(expected, dtype=torch.float64), **CLOSE)
    assert Awr(temperature=0.05, cap=20).weigh(batch, 0.0).coefficients[0] == 20


def test_fresh_ids_have_no_ratio_even_where_numbers_differ_by_rounding() -> None:
    f = flat(tables(1))
    batch = Experience(f["advantage"], f["reward"], f["mask"], f["unit"], f["old"] + 1e-7, f["old"], torch.ones_like(f["old"]) > 0)
    assert torch.equal(Grpo().weigh(batch, 0.0).coefficients, f["advantage"])
    assert torch.equal(Topr().weigh(batch, 0.0).coefficients, f["advantage"])


def test_gradients_equal_finite_differences() -> None:
    t = flat(tables(2))
    place = slice(0, 8)
    new, values = t["new"][place].clone().requires_grad_(True), t["value_now"][place].clone().requires_grad_(True)
    fixed = {name: tensor[place] for name, tensor in t.items()}

    def clipped(x: Tensor) -> Tensor:
        return losses.surrogate(x, fixed["old"], fixed["advantage"], 8.0)

    def critic(x: Tensor) -> Tensor:
        return losses.value_loss(x, fixed["value"], fixed["reward"], fixed["mask"], 8.0)

    assert torch.autograd.gradcheck(clipped, new) and torch.autograd.gradcheck(critic, values)
    assert torch.autograd.gradcheck(lambda x: losses.kl_estimate(x, fixed["reference"]), new)
    assert torch.autograd.gradcheck(lambda x: losses.imitation(x, fixed["advantage"], 8.0), new)


WORDS = 3
REWARDS = torch.tensor([[0.0, 1.0, 0.2], [0.5, 0.0, 0.0], [1.0, 0.3, 0.9]], dtype=torch.float64)
"""Of every sequence of two words."""


def joint(logits: Tensor) -> Tensor:
    """(3, 3) log-probs of all sequences under a table: first word's logits in line 0, the second's given the first in lines 1 to 3."""
    first, second = logits[0].log_softmax(-1), logits[1:].log_softmax(-1)
    return first.unsqueeze(1) + second


def exact_gradient(logits: Tensor, weights: Tensor) -> Tensor:
    """Of the sum over all sequences of probability times weight, by enumeration; the weights are not differentiated."""
    free = logits.clone().requires_grad_(True)
    (joint(free).exp() * weights).sum().backward()
    assert free.grad is not None
    return free.grad


def sampled_gradients(logits: Tensor, behaviour: Tensor, objective: Any, groups: int, size: int, seed: int) -> Tensor:
    """(groups, 4, 3) estimates, each from one group of ``size`` sequences drawn from ``behaviour``, with leave-one-out advantages."""
    dice = torch.Generator().manual_seed(seed)
    found = []
    said = torch.multinomial(joint(behaviour).exp().flatten(), groups * size, replacement=True, generator=dice).view(groups, size)
    for group in said:
        first, second = group // WORDS, group % WORDS
        rewards = REWARDS[first, second]
        advantages = rewards - (rewards.sum() - rewards) / (size - 1)

        def logprobs(table: Tensor, first: Tensor = first, second: Tensor = second) -> Tensor:
            return torch.stack([table[0].log_softmax(-1)[first], table[1:].log_softmax(-1)[first, second]], 1).flatten()

        free = logits.clone().requires_grad_(True)
        new = logprobs(free)
        old, mu = new.detach(), logprobs(behaviour).detach()
        unit, ones = torch.arange(size).repeat_interleave(2), torch.ones(2 * size, dtype=torch.float64)
        fresh = torch.full((2 * size,), bool(torch.equal(logits, behaviour)))
        batch = Experience(advantages.repeat_interleave(2), ones, ones, unit, mu, old, fresh)
        part = Part(objective.weigh(batch, 0.0).coefficients, old, ones, None, None, None)
        (-objective.loss(new, part, float(size), None, 0.0)).backward()
        assert free.grad is not None
        found.append(free.grad)
    return torch.stack(found)


def within(samples: Tensor, exact: Tensor) -> bool:
    """The mean lies within 4.5 standard errors of the exact value, in every component."""
    error = samples.std(0) / math.sqrt(len(samples))
    return bool(((samples.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all())


def test_the_group_estimator_is_the_exact_policy_gradient_on_average() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    samples = sampled_gradients(logits, logits, Grpo(), 2500, 4, seed=0)
    exact = exact_gradient(logits, REWARDS)
    assert within(samples, exact), (samples.mean(0), exact)
    assert not within(samples, 0.75 * exact), "the interval is narrow enough to tell the biased mean baseline (3/4) from ours"


def test_topr_on_old_logs_is_its_own_gradient_on_average() -> None:
    """What was praised counts by the old policy, what was blamed by the smaller of both (arXiv 2503.14286), baseline by leave-one-out."""
    dice = torch.Generator().manual_seed(8)
    logits = torch.randn(4, 3, generator=dice, dtype=torch.float64)
    behaviour = logits + 0.7 * torch.randn(4, 3, generator=dice, dtype=torch.float64)
    size, chances = 2, joint(behaviour).exp()
    exact = torch.zeros_like(logits)
    ratio = (joint(logits) - joint(behaviour)).exp().clamp(max=1.0)
    for one, other in itertools.product(itertools.product(range(3), repeat=2), repeat=size):
        gain = float(REWARDS[one] - REWARDS[other])
        weight = chances[one] * chances[other] * gain * (1.0 if gain >= 0 else float(ratio[one]))
        free = logits.clone().requires_grad_(True)
        joint(free)[one].backward()
        assert free.grad is not None
        exact += weight * free.grad
    assert within(sampled_gradients(logits, behaviour, Topr(), 2500, size, seed=1), exact)


@pytest.mark.parametrize("cap, biased", [(1e9, False), (1.0, True)])
def test_importance_ratios_mend_a_stale_log_and_truncation_costs_bias(cap: float, biased: bool) -> None:
    """One word: the ratio of an id is that of the sequence, so untruncated it is exact; the first line of the table decides all."""
    dice = torch.Generator().manual_seed(9)
    logits = torch.randn(4, 3, generator=dice, dtype=torch.float64)
    behaviour = logits.clone()
    behaviour[0] += torch.tensor([1.0, -1.0, 0.5])
    samples = sampled_gradients(logits, behaviour, Grpo(cap=cap, delta=None), 2500, 2, seed=2)[:, 0]
    old_mean = (joint(behaviour).exp() * REWARDS).sum()
    weights = REWARDS - old_mean  # siblings come from the old policy, so their mean is its mean
    exact = exact_gradient(logits, weights)[0]
    assert within(samples, exact) != biased
