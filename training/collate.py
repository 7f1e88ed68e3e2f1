"""Rows to tensors, and a model's log-probs of what was sampled in them.

Rows of different lengths are padded on the right; position ids are computed per row before padding, by the same ``Inputs`` that fed the
sampler, so padding moves nothing. Logits are asked for only where something was sampled (``logits_to_keep``): of a row of 2,000 ids with 60
sampled ones, 97 % of the vocabulary projection is never computed.

Log-probs come in two kinds, and mixing them is a silent bug. ``behaviour`` ones are of the distribution that was really sampled:
temperature and truncation of each call. ``plain`` ones are of the model itself (temperature 1, nothing cut), for imitation. Ids that a
sampler can never draw (picture placeholders) are banned in both.

Shapes: B rows, L padded length, P position axes (1, or 3 for M-RoPE), N patches, S sampled ids of all rows, K positions with logits,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from monologue.backends.base import Sampling
from monologue.backends.inputs import Inputs
from monologue.backends.sampling import log_distribution
from monologue.training.rows import Piece, Row, RowError
from monologue.training.trees import Line, lines, mask, parts

PLAIN = Sampling(temperature=1.0)
OUTSIDE = -20.0
"""Nats of a sampled id that the nucleus of the present weights leaves out. Minus infinity would be right and makes NaN of differences."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows as tensors."""

    inputs: dict[str, Tensor]
    """What the model's forward takes: ids (B, L), mask (B, L), positions (P, B, L) or (B, L), pixels (N, values), grids (pictures, 3)."""
    row: Tensor
    """(S,) line of each sampled id: its row, unless rows share lines."""
    column: Tensor
    """(S,) its place in the line."""
    before: Tensor
    """(S,) the place whose logits predict it: one earlier, or where the line branches off."""
    piece: Tensor
    """(S,) number of its call among all calls of the batch."""
    trained: Tensor
    """(S,) 1.0 where loss may fall."""
    behaviour: Tensor
    """(S,) recorded log-probs in float64; nan where none were recorded."""
    samplings: tuple[Sampling, ...]
    """How each sampled id was drawn, S of them."""

    @property
    def sampled(self) -> Tensor:
        """(S,) the ids themselves."""
        return self.inputs["input_ids"][self.row, self.column]


class Collate:
    """Makes batches for one checkpoint. ``picture`` gives a stored picture by its hash."""

    def __init__(self, inputs: Inputs, picture: Callable[[str], Image], pad: int = 0, trees: bool = False) -> None:
        """``trees``: rows of one problem share a line of the batch, and what they share is read once."""
        self._inputs, self._picture, self._pad, self.trees = inputs, picture, pad, trees

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Raises RowError for rows that do not fit the model, PictureError for pictures that are gone."""
        for row in rows:
            self._check(row)
        layout = lines(rows) if self.trees else [Line((place,), 0) for place in range(len(rows))]
        found: dict[int, Tensor] = {}
        pixels, grids = [], []
        for line in layout:
            row = rows[line.rows[0]]
            patches, grid = self._inputs.pixels([self._picture(image.sha256) for image in row.images]) if row.images else (None, None)
            found |= {place: self._inputs.positions(rows[place].ids, grid) for place in line.rows}
            if patches is not None and grid is not None:
                pixels.append(patches)
                grids.append(grid)
        inputs = self._padded(rows, layout, found)
        if pixels:
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        return Batch(inputs, *_places(rows, layout))

    def _check(self, row: Row) -> None:
        if not row.pieces:
            raise RowError(f"expected something sampled in the row of {row.stream!r} in episode {row.episode_id}, got nothing")
        if max(row.ids) >= self._inputs.vocabulary or min(row.ids) < 0:
            raise RowError(f"expected ids from 0 to {self._inputs.vocabulary - 1}, got {max(row.ids)} in episode {row.episode_id}")
        if row.images and not self._inputs.sees:
            raise RowError(f"the row of {row.stream!r} in episode {row.episode_id} holds pictures, but the model is text-only")
        held = sum(image.placeholder_count for image in row.images)
        if self._inputs.image_token_id is not None and row.ids.count(self._inputs.image_token_id) != held:
            raise RowError(f"expected {held} placeholders in episode {row.episode_id}, got {row.ids.count(self._inputs.image_token_id)}")

    def _padded(self, rows: Sequence[Row], layout: Sequence[Line], found: Mapping[int, Tensor]) -> dict[str, Tensor]:
        longest = max(sum(stop - begin for _, _, begin, stop in parts(line, rows)) for line in layout)
        ids = torch.full((len(layout), longest), self._pad)  # (B, L)
        branches = torch.full_like(ids, -1)
        positions = torch.zeros(found[0].shape[0], *ids.shape, dtype=torch.long)
        for number, line in enumerate(layout):
            end = 0
            for place, branch, begin, stop in parts(line, rows):
                here = slice(end, end + stop - begin)
                ids[number, here], branches[number, here] = torch.tensor(rows[place].ids[begin:stop]), branch
                positions[:, number, here] = found[place][:, begin:stop]
                end = here.stop
        seen = mask(branches) if self.trees else (branches > 0).long()
        return {"input_ids": ids, "attention_mask": seen, "position_ids": positions[0] if len(positions) == 1 else positions}


def _places(rows: Sequence[Row], layout: Sequence[Line]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Sampling, ...]]:
    """Line, column, the column before, call, mask and recorded log-prob of each sampled id, row by row."""
    home: dict[int, tuple[int, int, int]] = {}
    for number, line in enumerate(layout):
        end = 0
        for place, branch, begin, stop in parts(line, rows):
            if branch:
                home[place] = number, begin, end - begin
            end += stop - begin
    table: list[tuple[int, int, int, int, float, float]] = []
    samplings: list[Sampling] = []
    call = 0
    for place, row in enumerate(rows):
        number, shared, shift = home[place]
        for piece in row.pieces:
            values = piece.logprobs or (float("nan"),) * (piece.stop - piece.start)
            for at, one, value in zip(range(piece.start, piece.stop), piece.loss_mask, values, strict=True):
                table.append((number, at + shift, at - 1 + (shift if at > shared else 0), call, float(one), value))
            samplings += [_sampling(piece)] * (piece.stop - piece.start)
            call += 1
    columns = torch.tensor(table, dtype=torch.float64)  # (S, 6)
    line_of, column, before, piece_of = (columns[:, axis].long() for axis in range(4))
    return line_of, column, before, piece_of, columns[:, 4], columns[:, 5], tuple(samplings)


def _sampling(piece: Piece) -> Sampling:
    if piece.temperature is None:
        return PLAIN
    return Sampling(temperature=piece.temperature, top_p=piece.top_p or 1.0, top_k=piece.top_k or 0)


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model makes of a batch."""

    logprobs: Tensor
    """(S,) of the sampled ids, float64; OUTSIDE where these weights' nucleus leaves one out that others' held: no gradient there."""
    entropies: Tensor | None
    """(S,) nats, of the distribution that each id was drawn from."""
    states: Tensor | None
    """(S, D) last hidden state that predicted each id."""


def sampled_logprobs(model: Any, batch: Batch, banned: Sequence[int] = (), *, plain: bool = False) -> Tensor:
    """(S,) log-probs in float64, with gradient where the model has it: of the distribution that was sampled, or of the ``plain`` model."""
    return score(model, batch, banned, plain=plain).logprobs


def score(
    model: Any, batch: Batch, banned: Sequence[int] = (), *, plain: bool = False, entropies: bool = False, states: bool = False
) -> Scored:
    """``sampled_logprobs``, and what else is asked for."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    before = torch.unique(batch.before)  # (K,) places with logits
    out = model(**inputs, logits_to_keep=before.to(device), use_cache=False, output_hidden_states=states)
    row, place = batch.row.to(device), torch.searchsorted(before, batch.before).to(device)  # (S,)
    samplings = [PLAIN] if plain else batch.samplings
    log_probs = log_distribution(out.logits[row, place], samplings, banned)  # (S, V) of (B, K, V)
    found = log_probs.gather(-1, batch.sampled.to(device).unsqueeze(-1)).squeeze(-1)
    found = found.masked_fill(found == -math.inf, OUTSIDE)
    spread = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1) if entropies else None
    return Scored(found, spread, out.hidden_states[-1][row, batch.before.to(device)] if states else None)
