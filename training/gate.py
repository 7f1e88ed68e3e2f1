"""What stands between a trace and a gradient: the proof that both speak of the same policy, and the rules that end a run gone wrong.

The gate: on rows that the present weights have sampled, the trainer's own forward pass over the merged row (pictures, positions, padding
and all) must give the log-probs that were recorded when the ids were sampled, token by token, turn by turn. Nearly every silent bug of
peers, dropped pictures, retokenised replies, log-probs off by one, weights that were not pushed, shows as a difference here.

The rules (thresholds: ``Guards``) look at numbers over a batch or over time. Each ends the run with one sentence that says what was seen;
whoever knows better raises the threshold in the recipe. Entropy that halves is a breach only where reward has not risen with it:
a policy that learns to be right becomes sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from monologue.training.replay import TOLERANCE, agrees
from monologue.training.rows import Piece, Row

CERTAIN = 0.1
"""Nats an id; who is as sure as this has no exploration to lose."""


class GateError(ValueError):
    """The trainer does not see what was sampled, or a guard has fired."""


def gate(rows: Sequence[Row], logprobs: Sequence[Tensor], version: str, tolerance: float = TOLERANCE) -> tuple[int, float]:
    """Compares recorded log-probs with recomputed ones, (n,) float64 for each row's n sampled ids; returns how many ids were compared and
    the mean difference in nats. Pieces of other weights than ``version`` are passed over.

    Raises GateError that names the worst span, or a span without log-probs.
    """
    gaps: list[tuple[float, Piece, Tensor, Tensor]] = []
    for row, found in zip(rows, logprobs, strict=True):
        start = 0
        for piece in row.pieces:
            stop = start + piece.stop - piece.start
            if piece.logprobs is None:
                raise GateError(
                    f"span {piece.span_id} holds no log-probs: its engine returned text only (a hosted model, an oracle), and a policy "
                    "gradient needs the probability with which each token was sampled, so no ratio can be formed; take 'awr' or "
                    "'filter', or imitate"
                )
            if piece.weights_version == version and stop > start:
                old, new = found.new_tensor(piece.logprobs), found[start:stop]
                worst = float((old - new).abs().max())
                gaps.append((worst if worst == worst else float("inf"), piece, old, new))
            start = stop
    if not gaps:
        return 0, 0.0
    count = sum(len(old) for _, _, old, _ in gaps)
    mean = sum(float((old - new).abs().sum()) for _, _, old, new in gaps) / count
    worst, piece, old, new = max(gaps, key=lambda gap: gap[0])
    if not agrees(worst, mean, tolerance):
        where = f"span {piece.span_id}: recorded log-probs differ by {worst:.3g} nats from what {version!r} gives in training"
        where += f", by {mean:.2g} in the mean of {count} ids"
        raise GateError(f"{where} (tolerance {tolerance:.3g}){_shifted(old, new, tolerance)}")
    return count, mean


def _shifted(old: Tensor, new: Tensor, tolerance: float) -> str:
    """Whether the log-probs would fit one place earlier or later."""
    if len(old) > 2:
        for shift, gap in ((1, (old[1:] - new[:-1]).abs().max()), (-1, (old[:-1] - new[1:]).abs().max())):
            if float(gap) <= tolerance:
                return f"; they fit moved by {shift:+d}: off by one"
    return "; weights, pictures, ids or sampling settings are not those of the rollout"


class Guards(BaseModel):
    """Thresholds; None takes a rule out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    drift: float | None = Field(default=0.02, gt=0)
    """Mean |log p_old - log p_behaviour| of one and the same weights, in nats."""
    entropy: float | None = Field(default=0.5, gt=0, lt=1)
    """Entropy may not fall to this share of what it was ``window`` iterations ago, unless reward has risen."""
    window: int = Field(default=20, ge=1)
    """Iterations."""
    effective: float | None = Field(default=0.3, gt=0, lt=1)
    """Smallest effective sample size of the importance weights, as a share."""
    masked: float | None = Field(default=0.3, gt=0, lt=1)
    """Largest share of ids that corrections may leave out."""

    def check(self, history: Sequence[Mapping[str, float]], now: Mapping[str, float]) -> None:
        """``history``: what was measured before, oldest first. Raises GateError, whatever the thresholds, for what is no finite number."""
        strange = next((name for name, value in now.items() if not math.isfinite(value)), None)
        if strange is not None:
            raise GateError(f"expected finite measures, got {strange} {now[strange]!r}; no step was taken on this batch")
        for name, limit, sign in (("drift", self.drift, 1), ("effective", self.effective, -1), ("masked", self.masked, 1)):
            if limit is not None and name in now and sign * (now[name] - limit) > 0:
                side = "above" if sign > 0 else "below"
                raise GateError(f"the guard {name!r} fired: {now[name]:.3g} is {side} {limit:.3g}; {_ADVICE[name]}")
        if self.entropy is not None and len(history) >= self.window + self.window // 4:
            self._collapse([*history, now])

    def _collapse(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Means over a quarter of the window, since one batch is noisy."""
        few = max(1, self.window // 4)
        ends = lines[-few - self.window : -self.window], lines[-few:]
        (then, now), (before, after) = ([fmean(line[name] for line in end) for end in ends] for name in ("entropy", "reward"))
        if then >= CERTAIN and now < (self.entropy or 0) * then and after <= before:
            fell = f"entropy fell from {then:.3g} to {now:.3g} nats an id in {self.window} iterations"
            fell += f" while reward went from {before:.3g} to {after:.3g}"
            raise GateError(f"the guard 'entropy' fired: {fell}; {_ADVICE['entropy']}")


_ADVICE = {
    "drift": "the engine that samples and the trainer disagree about the same weights",
    "effective": "the log is too old for these weights: fewer updates per batch, fresher logs, or the objective 'topr'",
    "masked": "most of the batch is too old to be used: fresher logs, or the objective 'topr'",
    "entropy": "the policy stops exploring: a smaller learning rate, more samples a problem, or a KL penalty",
}
