"""The released IMMO script's view of a dialogue, to measure what it costs (``compat = "released"``).

Its PPO step glues question, question and conclusion together *without the answers in between*, and takes log-probs, values and KL on that
text, which the policy never acted on: the conclusion is scored blind to the evidence. Here that is done to our rows, ids as they were
sampled. The gate could never pass such rows, so ``compat`` switches it off, for this comparison alone.

Not copied: default questions trained as if they had been sampled, padding scored as reply, re-tokenised text, lengths drawn from the
batch size; the trace has none of them to give. Its rollout temperature of 0.1 is a setting of the recipe.
"""

from __future__ import annotations

from dataclasses import replace

from monologue.training.rows import Row


def as_released(row: Row) -> Row:
    """The row with nothing between what was sampled: opening, first reply, second reply, and so on. Raises ValueError for pictures."""
    if row.images:
        raise ValueError(f"the released script trains the questioner alone; the row of {row.role!r} holds pictures")
    ids, pieces = list(row.ids[: row.pieces[0].start]), []
    for piece in row.pieces:
        start = len(ids)
        ids += row.ids[piece.start : piece.stop]
        pieces.append(replace(piece, start=start, stop=len(ids)))
    return replace(row, ids=tuple(ids), pieces=tuple(pieces))
