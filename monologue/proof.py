"""Whether a run is what the policy saw: the trace's own checks and the replay of every log-prob, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from monologue.traces.verify import Check
from monologue.traces.verify import verify as check_trace


def verify(
    run: str | Path,
    *,
    replay: bool = True,
    weights: Mapping[str, str] | None = None,
    tolerance: float = 1e-4,
    calls: int | None = None,
) -> list[Check]:
    """All checks of a run. ``weights`` says where a policy's weights lie now, by policy id or ``policy_id@version``; ``calls`` limits the
    replay to the first ones; ``replay=False`` loads no model. Raises RunError where the folder is no run of this schema.
    """
    checks = check_trace(run)
    readable = not checks[0].detail or "torn" in checks[0].detail
    if not replay or not readable:
        return checks
    from monologue.training.replay import Weights
    from monologue.training.replay import replay as recompute

    return [*checks, *recompute(run, Weights(Path(run), weights), tolerance=tolerance, calls=calls)]
