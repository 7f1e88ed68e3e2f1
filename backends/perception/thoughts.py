"""Latent steps, one after another: feed the state, choose patches, feed them, take the new state.

Everything that a step does to a ragged batch stands here; which way it does it is a ``Mode``'s.

Shapes: B lanes, L padded prompt, P position axes, n steps, K patches a step, J patches of the lane with most, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monologue.backends.base import RequestRefused
from monologue.backends.perception.choosing import Choice
from monologue.backends.perception.modes import Mode
from monologue.backends.perception.prompts import Prompts
from monologue.backends.perception.reading import Block, Reader, onward, text

Halt = Callable[[int, Tensor], Tensor]
"""(step, states (B, D)) to (B,) bool: which lanes stop before this step."""


@dataclass(frozen=True, slots=True)
class Edits:
    """Interventions: what an evaluator puts in place of what a step made. Each takes the step's number from 0."""

    states: Callable[[int, Tensor], Tensor] | None = None
    """(B, D) as it would be fed."""
    chosen: Callable[[int, Tensor], Tensor] | None = None
    """(B, K) patch indices, -1 for none."""
    patches: Callable[[int, Tensor], Tensor] | None = None
    """(B, K, D) embeddings as they would be fed."""


@dataclass(slots=True)
class Thoughts:
    """What latent steps were, and the batch's state after them. Where a lane took fewer steps than n, its lines there mean nothing."""

    states: Tensor
    """(B, n, D) last hidden states that each step began with, with their graph whatever ``gradients`` says (an anchor loss needs it)."""
    fed: Tensor
    """(B, n, D) what was fed in their place: the same, detached, edited, or a pause; zeros with ``thought='none'``."""
    chosen: Tensor
    """(B, n, K) indices from 0 among the patches of all the lane's pictures, after edits; -1 for none."""
    patches: Tensor
    """(B, n, K, D) embeddings fed; zeros where none."""
    scores: Tensor | None
    """(B, n, J) attention that chose, averaged over layers and heads; None where attention did not choose."""
    steps: Tensor
    """(B,) how many each lane took."""
    last: Tensor
    """(B, D) hidden state that the first word is said from."""
    following: Tensor
    """(B,) position of the next place."""
    reader: Reader
    """The batch, read so far. Words are read from it once."""


@dataclass(frozen=True, slots=True)
class _Step:
    state: Tensor  # (B, D)
    fed: Tensor  # (B, D)
    chosen: Tensor  # (B, K)
    patches: Tensor  # (B, K, D)
    scores: Tensor | None  # (B, J)


class Thinking:
    """One run of latent steps over a batch."""

    def __init__(self, model: Any, mode: Mode, given: Prompts, wanted: Tensor, seeds: Sequence[int] | None, cached: bool) -> None:
        """``wanted`` (B,): steps of each lane. Raises RequestRefused, ValueError."""
        if mode.arrangement == "released" and any(count != 1 for count in given.pictures):
            raise RequestRefused(f"expected one picture a prompt, as the released code does, got {list(given.pictures)}; use another mode")
        self._mode, self._given, self._pool, self._embed = mode, given, given.pool, model.get_input_embeddings()
        self._wanted, self._most = wanted, int(wanted.max())
        self._reader, self._choice = Reader(model, cached=cached), Choice(mode, given.there, seeds)
        flat = onward(torch.zeros_like(wanted), given.valid).expand_as(given.positions)
        self._places = flat if mode.positions == "flat" else given.positions  # (P, B, L)
        self._following = self._places.masked_fill(~given.valid, -1).amax(dim=(0, 2)) + 1  # (B,)
        self._state = given.embeds[:, -1]  # (B, D), until the prompt is read
        self._scores: Tensor | None = None

    def run(self, chosen: Tensor | None, edits: Edits, halt: Halt | None) -> Thoughts:
        """All steps. ``chosen`` (B, n, any K) are taken in place of a choice."""
        if chosen is not None and (self._mode.patches == "none" or chosen.ndim != 3 or chosen.shape[1] < self._most):
            raise ValueError(f"expected chosen patches (lanes, {self._most}, K) and a mode with patches, got {tuple(chosen.shape)}")
        looks = chosen is None and self._mode.patches == "attended"
        early = looks and self._mode.selects == "row"
        self._read(self._prompt(), row=early and self._most > 0)
        steps, taken = list[_Step](), torch.zeros_like(self._wanted)
        for number in range(self._most):
            alive = (self._wanted > number) & (taken == number)  # (B,)
            if halt is not None:
                alive = alive & ~halt(number, self._state)
            if not bool(alive.any()):
                break
            forced = None if chosen is None else chosen[:, number]
            steps.append(self._step(number, alive, forced, edits, before=early and number + 1 < self._most, during=looks and not early))
            taken = taken + alive.long()
        return self._thoughts(steps, taken)

    def _prompt(self) -> Block:
        picture = self._given.picture
        blind = ~picture if self._mode.bottleneck == "picture" else torch.zeros_like(picture)
        return Block(self._given.embeds, self._given.valid, self._places, picture, blind)

    def _step(self, number: int, alive: Tensor, forced: Tensor | None, edits: Edits, *, before: bool, during: bool) -> _Step:
        """``before``: attention of this step chooses for the next; ``during``: attention of the state, once read, chooses for this one."""
        state, fed = self._state, self._feed(number, edits)
        late = self._mode.selects == "state"
        if late:
            self._read(self._thought(fed, alive), row=during)
        scores = self._scores
        chosen = self._choose(number, alive, forced, edits)
        patches = self._patches(number, chosen, edits)
        if late:
            self._read(self._look(patches, chosen))
        elif self._mode.order == "state-first":
            self._read(self._thought(fed, alive).then(self._look(patches, chosen)), row=before)
        else:
            self._read(self._look(patches, chosen).then(self._thought(fed, alive)), row=before)
        return _Step(state, fed, chosen, patches, scores)

    def _feed(self, number: int, edits: Edits) -> Tensor:
        """(B, D) that stands for the state in the sequence."""
        if self._mode.thought == "none":
            return torch.zeros_like(self._state)
        fed = self._state.detach() if self._mode.gradients == "detached" else self._state
        if self._mode.thought == "pause":
            fed = self._embed(torch.full_like(self._wanted, self._mode.pause_id or 0))
        return fed if edits.states is None else edits.states(number, fed)

    def _choose(self, number: int, alive: Tensor, forced: Tensor | None, edits: Edits) -> Tensor:
        """(B, K) patches of this step, marked as taken."""
        if self._mode.patches == "none":
            return self._wanted.new_zeros(len(alive), 0)
        chosen = self._choice.choose(self._scores, number, alive) if forced is None else forced
        chosen = chosen.masked_fill(~alive.unsqueeze(1), -1)
        if edits.chosen is not None:
            chosen = edits.chosen(number, chosen)
        self._choice.take(chosen)
        return chosen

    def _patches(self, number: int, chosen: Tensor, edits: Edits) -> Tensor:
        """(B, K, D) embeddings."""
        width = self._pool.shape[-1]
        if not self._pool.shape[1]:
            return self._pool.new_zeros(*chosen.shape, width)
        found = self._pool.gather(1, chosen.clamp(min=0).unsqueeze(-1).expand(-1, -1, width))
        found = found.masked_fill((chosen < 0).unsqueeze(-1), 0.0)
        if self._mode.choice == "through" and self._scores is not None:
            shares = self._scores / self._scores.sum(1, keepdim=True).clamp(min=torch.finfo(self._scores.dtype).tiny)  # (B, J)
            mixed = shares.unsqueeze(1) @ self._pool  # (B, 1, D)
            found = found + (mixed - mixed.detach())
        return found if edits.patches is None else edits.patches(number, found)

    def _thought(self, fed: Tensor, alive: Tensor) -> Block:
        """The state's place; nothing with ``thought='none'``."""
        size = 0 if self._mode.thought == "none" else 1
        valid = alive.unsqueeze(1)[:, :size]
        places = onward(self._following, valid).expand(len(self._places), -1, -1)
        self._following = self._following + valid.sum(1)
        return text(fed.unsqueeze(1)[:, :size], valid, places, blind=self._mode.bottleneck != "off")

    def _look(self, patches: Tensor, chosen: Tensor) -> Block:
        """The patches' places, no wider than the last real one of any lane."""
        valid = chosen >= 0
        valid = valid[:, : int((valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax()) if valid.numel() else 0]
        if self._mode.positions == "placed" and valid.shape[1]:
            spots = self._given.spots.gather(1, chosen[:, : valid.shape[1]].clamp(min=0)).clamp(min=0)  # (B, K)
            places = self._places.gather(2, spots.expand(len(self._places), -1, -1))
        else:
            places = onward(self._following, valid).expand(len(self._places), -1, -1)
            self._following = self._following + valid.sum(1)
        return text(patches[:, : valid.shape[1]], valid, places, blind=self._mode.bottleneck != "off")

    def _read(self, block: Block, *, row: bool = False) -> None:
        """Moves every lane that has something in the block to its last valid place there."""
        if not block.valid.shape[1]:
            return
        state, weights = self._reader.arrive(block, row=row, graph=self._mode.choice == "through")
        self._state = torch.where(block.valid.any(1, keepdim=True), state, self._state)
        if weights is not None:
            self._scores = weights.gather(1, self._given.spots.clamp(min=0)).masked_fill(~self._given.there, 0.0)  # (B, J)

    def _thoughts(self, steps: list[_Step], taken: Tensor) -> Thoughts:
        lanes, width, k = len(taken), self._pool.shape[-1], 0 if self._mode.patches == "none" else self._mode.k
        if not steps:
            none = self._state.new_zeros(lanes, 0, width)
            empty = taken.new_zeros(lanes, 0, k)
            return Thoughts(none, none, empty, none.new_zeros(lanes, 0, k, width), None, taken, self._state, self._following, self._reader)
        names = ("state", "fed", "chosen", "patches")
        states, fed, chosen, patches = (torch.stack([getattr(one, name) for one in steps], 1) for name in names)
        scored = [one.scores for one in steps if one.scores is not None]
        scores = torch.stack(scored, 1) if len(scored) == len(steps) else None
        return Thoughts(states, fed, chosen, patches, scores, taken, self._state, self._following, self._reader)
