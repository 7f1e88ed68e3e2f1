"""A server's answer to ``/generate``, read with suspicion: what does not add up is an error, never a trace that lies.

The prompt's tokens must be ours, else the server tokenised anew or prepared the pictures otherwise. The ids of the log-probs must be
the sampled ids. A placeholder must not have been sampled. With top-p or top-k the plain log-probs are those before truncation; those of the
distribution that was really sampled stand beside them, where the sampling mask was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from monologue.backends.base import BackendError, BackendUnavailable, FinishReason, Generation, Sampling
from monologue.backends.places import UNKNOWN


def read_generation(answer: dict[str, Any], prompt: Sequence[int], sampling: Sampling, banned: Sequence[int]) -> Generation:
    """The generation in an answer. Raises BackendError, BackendUnavailable for one that the server aborted."""
    _check_prompt(answer, prompt)
    meta, ids = answer["meta_info"], tuple(int(token) for token in answer["output_ids"])
    if forbidden := [token for token in ids if token in banned]:
        raise BackendError(f"the server sampled the placeholder {forbidden[0]}, which it was told not to")
    return Generation(
        ids=ids,
        logprobs=_logprobs(meta, ids, truncated(sampling)),
        finish_reason=_finish(meta, ids, sampling),
        weights_version=version(meta.get("weight_version")),
        cached_tokens=meta.get("cached_tokens"),
        weights=_weights(meta),
    )


def read_scores(answer: dict[str, Any], prompt: Sequence[int], ids: Sequence[int], banned: Sequence[int]) -> tuple[float, ...]:
    """Log-probs (nats) of ``ids`` after the prompt, with what ``banned`` ids would have taken given to the others. Raises BackendError."""
    _check_prompt(answer, (*prompt, *ids))
    meta = answer["meta_info"]
    rows = meta["input_token_logprobs"][-len(ids) :]
    if [row[1] for row in rows] != list(ids):
        raise BackendError(f"the server scored other ids than it was sent: {[row[1] for row in rows][:5]} for {list(ids)[:5]}")
    if not banned:
        return tuple(float(row[0]) for row in rows)
    taken = [sum(math.exp(one[0]) for one in row) for row in meta["input_token_ids_logprobs"][-len(ids) :]]
    return tuple(float(row[0]) - math.log1p(-mass) for row, mass in zip(rows, taken, strict=True))


def versions(meta: dict[str, Any]) -> list[str]:
    """Of the weights that sampled an answer, in order; the last one twice where there were several."""
    return [*(name for name, _, _ in _weights(meta)), version(meta.get("weight_version"))]


def _check_prompt(answer: dict[str, Any], prompt: Sequence[int]) -> None:
    """The server read the ids that the trace holds, pictures expanded."""
    count, read = answer["meta_info"].get("prompt_tokens"), answer.get("prompt_token_ids")
    if count != len(prompt):
        raise BackendError(
            f"the prompt has {len(prompt)} ids with its pictures expanded, but the server counted {count!r}: "
            "it prepares pictures otherwise or tokenised anew; give both sides the same processor settings"
        )
    if read is not None and (wrong := [place for place, (a, b) in enumerate(zip(read, prompt, strict=True)) if a != b]):
        raise BackendError(
            f"the server read id {read[wrong[0]]} at place {wrong[0]} of the prompt, not {prompt[wrong[0]]}: it tokenised anew"
        )


def whole(answer: dict[str, Any], url: str, rid: str) -> dict[str, Any]:
    """The answer, if it is one. Raises BackendError."""
    meta = answer.get("meta_info")
    if not isinstance(meta, dict) or not isinstance(answer.get("output_ids"), list):
        raise BackendError(f"expected output_ids and meta_info from {url} for request {rid}, got keys {sorted(answer)!r}")
    if not isinstance(meta.get("finish_reason"), dict):
        raise BackendError(f"the server {url} left request {rid} unfinished after {len(answer['output_ids'])} ids")
    return answer


def truncated(sampling: Sampling) -> bool:
    """Whether tokens are cut off before one is drawn."""
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)


def version(name: object) -> str:
    """The server's name for weights whose version nobody told it is ``default``; ours is ``base``."""
    return UNKNOWN if name in (None, "default") else str(name)


def _logprobs(meta: dict[str, Any], ids: tuple[int, ...], cut: bool) -> tuple[float, ...]:
    rows = meta.get("output_token_logprobs") or []
    if [row[1] for row in rows] != list(ids):
        raise BackendError(f"the server sent log-probs for other ids than it sampled: {[row[1] for row in rows][:5]} for {list(ids)[:5]}")
    if not cut:
        return tuple(float(row[0]) for row in rows)
    values = meta.get("output_token_sampling_logprobs")
    if values is None or len(values) != len(ids):
        raise BackendError("the server sent no log-probs of the truncated distribution; sample with top_p=1 and top_k=0 on this version")
    return tuple(min(0.0, float(value)) for value in values)


def _weights(meta: dict[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """Versions and the ids that each sampled; empty where one sampled all."""
    found = tuple((version(one["version"]), int(one["start"]), int(one["end"])) for one in meta.get("weight_versions") or ())
    return found if len(found) > 1 else ()


def _finish(meta: dict[str, Any], ids: tuple[int, ...], sampling: Sampling) -> FinishReason:
    kind = (meta.get("finish_reason") or {}).get("type")
    if kind == "abort":
        raise BackendUnavailable(f"the server aborted the request after {len(ids)} tokens: {meta['finish_reason'].get('message')!r}")
    return "stop" if kind == "stop" or (ids and ids[-1] in sampling.stop_ids) else "length"
