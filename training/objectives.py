"""What reinforcement maximises: one class an objective, with its settings and two methods.

``weigh`` looks at a whole batch of experience when an update begins and gives every sampled id its coefficient; ``loss`` is differentiated,
micro-batch by micro-batch. Formulas are in ``losses``; the settings' defaults are those of the sources named there.

    grpo     clipped surrogate, leave-one-out baseline, token mean; corrections for stale logs        online default
    ppo      value head, GAE over sampled ids, whitened, KL to the start as a token's reward          IMMO
    topr     tapered off-policy REINFORCE                                                             old logs with log-probs
    awr      imitation weighted by exp(advantage)                                                     logs without log-probs
    filter   imitation of what earned enough                                                          logs without log-probs

Two log-probs are kept apart: ``behaviour`` by the weights that sampled, ``old`` by the weights when the update began. Where both are the
same weights their ratio is one by definition, and the gate has proven that the numbers agree, so none is formed from rounding errors.
Settings that an objective does not know are refused, never ignored.

Shapes: S sampled ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from monologue.training import losses


@dataclass(frozen=True, slots=True)
class Experience:
    """All sampled ids of one role in one batch, stream by stream, in order; nothing of it is differentiated."""

    advantages: Tensor
    """(S,) of each id's turn, by ``credit``."""
    rewards: Tensor
    """(S,) what was earned at this very id: at the last of a turn, else 0."""
    mask: Tensor
    """(S,) 1.0 where loss may fall."""
    unit: Tensor
    """(S,) number of the stream."""
    behaviour: Tensor
    """(S,) recorded log-probs; nan where there are none."""
    old: Tensor
    """(S,) log-probs when the update began."""
    fresh: Tensor
    """(S,) True where the weights that sampled are those that are trained now."""
    values: Tensor | None = None
    """(S,) by the critic when the update began."""
    reference: Tensor | None = None
    """(S,) log-probs by the weights that training started from."""

    @property
    def ratio(self) -> Tensor:
        """(S,) log p_old / p_behaviour, 0.0 where both are the same weights."""
        return torch.where(self.fresh, 0.0, self.old - self.behaviour)


@dataclass(frozen=True, slots=True)
class Weighed:
    """What ``weigh`` found."""

    coefficients: Tensor
    """(S,) of the differentiable form."""
    targets: Tensor | None = None
    """(S,) returns that the critic should predict."""
    masked: float = 0.0
    """Share of the ids that a correction left out."""
    effective: float = 1.0
    """Effective sample size of the importance weights, as a share."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some sampled ids in a micro-batch, aligned with the model's log-probs."""

    coefficients: Tensor
    """(S,)"""
    old: Tensor
    """(S,)"""
    mask: Tensor
    """(S,)"""
    reference: Tensor | None
    """(S,)"""
    values: Tensor | None
    """(S,)"""
    targets: Tensor | None
    """(S,)"""

    def to(self, device: torch.device) -> Part:
        """The same on another device."""
        here: list[Any] = [getattr(self, name) for name in self.__dataclass_fields__]
        moved: list[Any] = [None if one is None else one.to(device) for one in here]
        return Part(*moved)


class Base(BaseModel):
    """What objectives share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def critic(self) -> bool:
        """Trains a value head."""
        return False

    @property
    def ratios(self) -> bool:
        """Forms ratios, so it needs recorded log-probs."""
        return True

    @property
    def penalty(self) -> float:
        """Initial weight of the KL to the weights that training started from."""
        return 0.0

    def weigh(self, batch: Experience, penalty: float) -> Weighed:
        raise NotImplementedError

    def loss(self, new: Tensor, part: Part, count: float, values: Tensor | None, penalty: float) -> Tensor:
        """A micro-batch's part of the loss; ``count`` is of the whole step."""
        return losses.imitation(new, part.coefficients, count)

    def held(self, new: Tensor, part: Part) -> float:
        """Share of the ids that the clip holds back."""
        return 0.0


class _Clipped(Base):
    low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio may fall by this."""
    high: float = Field(default=0.28, gt=0)
    """The ratio may rise by this."""
    dual: float | None = Field(default=3.0, gt=1)
    """Floor of negative terms, in multiples of their coefficient."""

    def held(self, new: Tensor, part: Part) -> float:
        return float(losses.clipped_share(new, part.old, part.coefficients, low=self.low, high=self.high))

    def _surrogate(self, new: Tensor, part: Part, count: float) -> Tensor:
        return losses.surrogate(new, part.old, part.coefficients, count, low=self.low, high=self.high, dual=self.dual)


class Grpo(_Clipped):
    """Group-relative policy optimisation as it is practised now: no critic, no division by the standard deviation, token mean."""

    name: Literal["grpo"] = "grpo"
    cap: float | None = Field(default=2.0, gt=0)
    """Importance ratios of stale ids are truncated here; None: stale ids are taken as if they were fresh."""
    delta: float | None = Field(default=0.5, gt=0)
    """A blamed sequence that has become less likely than this (nats an id) is left out; None: never."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL to the weights that training started from (k3), in the loss."""

    @property
    def penalty(self) -> float:
        return self.kl

    def weigh(self, batch: Experience, penalty: float) -> Weighed:
        weights = batch.mask
        if self.cap is not None:
            weights = weights * losses.importance(batch.ratio, torch.zeros_like(batch.ratio), self.cap)
        kept = torch.ones_like(batch.mask)
        if self.delta is not None:
            kept = losses.stale_mask(batch.ratio, torch.zeros_like(batch.ratio), batch.advantages, batch.mask, batch.unit, self.delta)
        return Weighed(batch.advantages * weights * kept, None, _lost(kept, batch.mask), effective(batch))

    def loss(self, new: Tensor, part: Part, count: float, values: Tensor | None, penalty: float) -> Tensor:
        loss = self._surrogate(new, part, count)
        if penalty and part.reference is not None:
            loss = loss + penalty * (losses.kl_estimate(new, part.reference) * part.mask).sum() / count
        return loss


class Ppo(_Clipped):
    """Proximal policy optimisation with a critic, as IMMO trains; loss, values and KL fall on sampled ids alone."""

    name: Literal["ppo"] = "ppo"
    high: float = Field(default=0.2, gt=0)
    """The ratio may rise by this."""
    dual: float | None = None
    """Floor of negative terms, in multiples of their coefficient; None: none, as IMMO."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Of later rewards, per sampled id."""
    decay: float = Field(default=0.95, ge=0, le=1)
    """Lambda of GAE."""
    value: float = Field(default=0.1, ge=0)
    """Weight of the critic's loss."""
    value_clip: float = Field(default=0.2, gt=0)
    """A value may move by this in an update."""
    kl: float = Field(default=0.2, ge=0)
    """Price of a nat of KL to the start, taken off each id's reward."""
    target: float | None = Field(default=6.0, gt=0)
    """Nats of KL a sequence that the price is adapted to; None: the price stays."""
    horizon: float = Field(default=10_000, gt=0)
    """Sequences over which the price adapts."""
    whitened: bool = True
    """Advantages are brought to mean 0 and deviation 1."""

    @property
    def critic(self) -> bool:
        return True

    @property
    def penalty(self) -> float:
        return self.kl

    def weigh(self, batch: Experience, penalty: float) -> Weighed:
        assert batch.values is not None
        rewards = batch.rewards
        if batch.reference is not None:
            rewards = rewards - penalty * (batch.old - batch.reference)
        advantages = losses.gae(rewards, batch.values, batch.unit, self.discount, self.decay)
        shown = losses.whiten(advantages, batch.mask) if self.whitened else advantages * batch.mask
        return Weighed(shown, advantages + batch.values, 0.0, effective(batch))

    def loss(self, new: Tensor, part: Part, count: float, values: Tensor | None, penalty: float) -> Tensor:
        assert values is not None and part.values is not None and part.targets is not None
        critic = losses.value_loss(values, part.values, part.targets, part.mask, count, self.value_clip)
        return self._surrogate(new, part, count) + self.value * critic

    def adapted(self, penalty: float, divergence: float, sequences: int) -> float:
        """The price after a batch of so many sequences with this KL (nats a sequence): proportional control, error cut at 20 %."""
        if self.target is None:
            return penalty
        error = min(0.2, max(-0.2, divergence / self.target - 1))
        return penalty * (1 + error * sequences / self.horizon)


class Topr(Base):
    """Tapered off-policy REINFORCE: stable on old logs, because blame fades with the likelihood of what is blamed."""

    name: Literal["topr"] = "topr"

    def weigh(self, batch: Experience, penalty: float) -> Weighed:
        ratio = losses.sequence_ratio(batch.ratio, torch.zeros_like(batch.ratio), batch.mask, batch.unit)
        return Weighed(losses.topr(batch.advantages, ratio) * batch.mask, None, 0.0, effective(batch))


class Awr(Base):
    """Advantage-weighted regression; advantages are whitened first, so that the temperature has a meaning."""

    name: Literal["awr"] = "awr"
    temperature: float = Field(default=1.0, gt=0)
    """Smaller is greedier."""
    cap: float = Field(default=20.0, gt=0)
    """Largest weight."""

    @property
    def ratios(self) -> bool:
        return False

    def weigh(self, batch: Experience, penalty: float) -> Weighed:
        return Weighed(losses.awr(losses.whiten(batch.advantages, batch.mask), self.temperature, self.cap) * batch.mask)


class Filter(Base):
    """Rejection sampling: imitation of the streams whose rewards sum to enough."""

    name: Literal["filter"] = "filter"
    least: float = 1.0
    """Smallest sum of rewards that is imitated."""

    @property
    def ratios(self) -> bool:
        return False

    def weigh(self, batch: Experience, penalty: float) -> Weighed:
        earned = losses.per_unit(batch.rewards, torch.ones_like(batch.mask), batch.unit)
        kept = (earned >= self.least).to(batch.mask)
        return Weighed(batch.mask * kept)


Objective: TypeAlias = Annotated[Grpo | Ppo | Topr | Awr | Filter, Field(discriminator="name")]


def effective(batch: Experience) -> float:
    """Effective share of the ids under their importance weights, before any truncation."""
    return losses.effective_share(batch.ratio[batch.mask > 0].exp())


def _lost(kept: Tensor, mask: Tensor) -> float:
    return 1.0 - float((kept * mask).sum() / mask.sum().clamp(min=1))
