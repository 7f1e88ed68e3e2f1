"""The decode loop: many sequences through one causal model, each with its own pictures, sampling, seed and end.

Sequences are padded on the left, with an attention mask and explicit positions, so padding changes no number that matters.
Positions are computed per sequence before batching (for Qwen-VL by the model's own ``get_rope_index``), and continue by one
after the prompt. A sequence that stops is handed over at once and leaves the batch: its rows are cut from the key-value cache,
so the others get faster, and nobody waits for the longest. A word on names: a *lane* is a sequence in a batch; a *row* is what
a trainer makes of it.

Shapes: B lanes, L padded length, P position axes (1, or 3 for M-RoPE), V vocabulary, K kept logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from monologue.backends.base import Sampling, Thought
from monologue.backends.kept import Kept, roomy
from monologue.backends.prefixes import Prefix, Prefixes
from monologue.backends.sampling import draw, log_distribution


@dataclass(slots=True, eq=False)
class Lane:
    """One sequence on its way through the model."""

    ids: tuple[int, ...]
    """What goes in first: the prompt, and when scoring the ids to score."""
    positions: Tensor
    """Position ids of ``ids``, (P, L)."""
    pixels: Tensor | None
    """Patches of all its pictures, one after another; None without pictures."""
    grids: Tensor | None
    """Patches along time, height and width, one line a picture."""
    sampling: Sampling
    """How its tokens are drawn."""
    limit: int
    """Most tokens to sample: the caller's wish or what the context leaves."""
    affinity: str = ""
    """The stream, where its state is to be kept for the next call."""
    pictures: tuple[str, ...] = ()
    """Hashes of its pictures."""
    read: Prefix | None = None
    """What of ``ids`` was read by an earlier call."""
    dice: random.Random = field(default_factory=random.Random)
    """Source of its uniform numbers, one a token."""
    sampled: list[int] = field(default_factory=list)
    """Ids drawn so far."""
    logprobs: list[float] = field(default_factory=list)
    """Their log-probs in nats."""
    entropies: list[float] = field(default_factory=list)
    """Of the distributions that they were drawn from, in nats."""
    thoughts: tuple[Thought, ...] = ()
    """Latent steps before the first id."""
    chosen: tuple[tuple[int, ...], ...] | None = None
    """Patches that its latent steps are to take, a tuple a step; None: it chooses, and stops, by itself."""

    @property
    def cached(self) -> int:
        return 0 if self.read is None else len(self.read.ids)

    @property
    def beginning(self) -> Any:
        """What is the same only for lanes that the model reads alike; what an earlier call has read makes a lane its own. Pictures are
        compared by what is fed of them, one tensor for both: a hash beside one may be somebody's mistake.
        """
        return id(self) if self.read is not None else (self.ids, id(self.pixels))

    @property
    def stopped(self) -> bool:
        return bool(self.sampled) and self.sampled[-1] in self.sampling.stop_ids

    @property
    def done(self) -> bool:
        return self.stopped or len(self.sampled) >= self.limit


@dataclass(slots=True)
class _Batch:
    """State between two steps."""

    lanes: list[Lane]
    logits: Tensor  # (B, V)
    mask: Tensor  # (B, L)
    next_positions: Tensor  # (P, B, 1)
    cache: Any

    def keep(self, places: list[int]) -> None:
        if len(places) == len(self.lanes):
            return
        self.lanes = [self.lanes[place] for place in places]
        self.take(places)

    def take(self, places: list[int]) -> None:
        """Of what is computed, the lanes at ``places``, in this order and as often as they are named."""
        index = torch.tensor(places, device=self.mask.device)
        self.logits, self.mask, self.next_positions = self.logits[index], self.mask[index], self.next_positions[:, index]
        self.cache.batch_select_indices(index)


class Decoder:
    """Runs lanes through ``model``. ``banned`` ids are never sampled: a placeholder without picture breaks the next prompt."""

    def __init__(self, model: Any, banned: Sequence[int], prefixes: Prefixes | None = None) -> None:
        self._prefixes = prefixes or Prefixes(0)
        self._model, self._banned = model, tuple(banned)
        self._pad = next(token for token in range(len(self._banned) + 1) if token not in self._banned)

    @torch.inference_mode()
    def generate(self, lanes: list[Lane], dropped: Callable[[Lane], bool]) -> Iterator[Lane]:
        """Yields each lane when it is done; lanes that are ``dropped`` leave without a word."""
        batch = self._prefill(lanes)
        while True:
            self._sample(batch)
            self._remember(batch)
            yield from [lane for lane in batch.lanes if lane.done]
            places = [place for place, lane in enumerate(batch.lanes) if not lane.done and not dropped(lane)]
            if not places:
                return
            batch.keep(places)
            self._step(batch)

    @torch.inference_mode()
    def score(self, lanes: list[Lane], counts: list[int]) -> list[tuple[float, ...]]:
        """Log-probs of the last ``count`` ids of each lane, all in one pass."""
        out, _, _ = self._forward(lanes, keep=max(counts) + 1, use_cache=False)
        found = []
        for lane, row, count in zip(lanes, out.logits, counts, strict=True):  # (K, V)
            log_probs = log_distribution(row[-count - 1 : -1], [lane.sampling], self._banned)  # (count, V)
            wanted = torch.tensor(lane.ids[len(lane.ids) - count :], device=row.device).unsqueeze(-1)
            found.append(tuple(log_probs.gather(-1, wanted).squeeze(-1).tolist()))
        return found

    def _prefill(self, lanes: list[Lane]) -> _Batch:
        """Lanes that begin alike, such as a problem's episodes, are read once."""
        alike = {lane.beginning: lane for lane in lanes}
        out, mask, positions = self._forward(list(alike.values()), keep=1, use_cache=True)
        following = positions.amax(dim=-1, keepdim=True).amax(dim=0, keepdim=True) + 1  # (1, B, 1)
        batch = _Batch(lanes, out.logits[:, -1], mask, following.expand(positions.shape[0], -1, -1), roomy(out.past_key_values))
        if len(alike) < len(lanes):
            places = {beginning: place for place, beginning in enumerate(alike)}
            batch.take([places[lane.beginning] for lane in lanes])
        return batch

    def _remember(self, batch: _Batch) -> None:
        """Keeps the state of lanes that are done: everything but the last sampled id was fed."""
        plain = self._prefixes.most and all(type(layer) is Kept for layer in batch.cache.layers)
        for place, lane in enumerate(batch.lanes):
            if plain and lane.affinity and lane.done:
                fed = batch.mask[place].nonzero().squeeze(-1)  # (L)
                halves = ((layer.keys[place], layer.values[place]) for layer in batch.cache.layers)
                layers = tuple((keys.index_select(1, fed), values.index_select(1, fed)) for keys, values in halves)
                self._prefixes.put(lane.affinity, Prefix((*lane.ids, *lane.sampled[:-1]), lane.pictures, layers))

    def _step(self, batch: _Batch) -> None:
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.lanes), 1)], dim=-1)
        out = self._model(
            input_ids=torch.tensor([[lane.sampled[-1]] for lane in batch.lanes], device=batch.mask.device),
            attention_mask=batch.mask,
            position_ids=_squeeze(batch.next_positions),
            past_key_values=batch.cache,
            use_cache=True,
        )
        batch.logits, batch.cache, batch.next_positions = out.logits[:, -1], out.past_key_values, batch.next_positions + 1

    def _sample(self, batch: _Batch) -> None:
        samplings = [lane.sampling for lane in batch.lanes]
        log_probs = log_distribution(batch.logits, samplings, self._banned)  # (B, V)
        tokens = draw(log_probs, samplings, [lane.dice.random() for lane in batch.lanes])
        values = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        entropies = torch.special.entr(log_probs.exp()).sum(-1)  # (B)
        for lane, token, value, entropy in zip(batch.lanes, tokens.tolist(), values.tolist(), entropies.tolist(), strict=True):
            lane.sampled.append(token)
            lane.logprobs.append(value)
            lane.entropies.append(entropy)

    def _forward(self, lanes: list[Lane], *, keep: int, use_cache: bool) -> tuple[Any, Tensor, Tensor]:
        ids, mask, positions = self._pad_left(lanes)
        pictures: dict[str, Tensor] = {}
        if pixels := [lane.pixels for lane in lanes if lane.pixels is not None]:
            pictures["pixel_values"] = torch.cat(pixels).to(ids.device)
            pictures["image_grid_thw"] = torch.cat([lane.grids for lane in lanes if lane.grids is not None]).to(ids.device)
        past, seen = self._past(lanes)
        if past is not None:
            pictures["past_key_values"] = past
        mask = torch.cat([seen.to(mask.device), mask], dim=-1)  # (B, C + L)
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_squeeze(positions),
            use_cache=use_cache,
            logits_to_keep=keep,
            **pictures,
        )
        return out, mask, positions

    def _past(self, lanes: list[Lane]) -> tuple[Any, Tensor]:
        """What lanes have read already, padded on the left to the longest (C), and its mask (B, C)."""
        longest = max(lane.cached for lane in lanes)
        mask = torch.zeros(len(lanes), longest, dtype=torch.long)
        known = next((lane.read for lane in lanes if lane.read is not None), None)
        if known is None:
            return None, mask
        for place, lane in enumerate(lanes):
            mask[place, longest - lane.cached :] = 1
        layers = []
        for number, pair in enumerate(known.layers):
            padded = [pair[half].new_zeros(len(lanes), pair[half].shape[0], longest, pair[half].shape[2]) for half in (0, 1)]
            for place, lane in enumerate(lanes):
                if lane.read is not None:
                    for half in (0, 1):
                        padded[half][place, :, longest - lane.cached :] = lane.read.layers[number][half]
            layers.append((padded[0], padded[1]))
        return DynamicCache(layers), mask

    def _pad_left(self, lanes: list[Lane]) -> tuple[Tensor, Tensor, Tensor]:
        length, axes = max(len(lane.ids) - lane.cached for lane in lanes), lanes[0].positions.shape[0]
        ids = torch.full((len(lanes), length), self._pad)
        mask = torch.zeros(len(lanes), length, dtype=torch.long)
        positions = torch.zeros(axes, len(lanes), length, dtype=torch.long)
        for place, lane in enumerate(lanes):
            start = length - len(lane.ids) + lane.cached
            ids[place, start:] = torch.tensor(lane.ids[lane.cached :])
            mask[place, start:] = 1
            positions[:, place, start:] = lane.positions[:, lane.cached :]
        device = self._model.device
        return ids.to(device), mask.to(device), positions.to(device)


def _squeeze(positions: Tensor) -> Tensor:
    """(B, L) for models with one position axis, (3, B, L) for M-RoPE."""
    return positions[0] if positions.shape[0] == 1 else positions
