"""Reading a batch block by block: the prompt, then each latent step, then words, every position seeing what came before it.

A reader keeps keys and values (``cached``), which also serves training, because a cache that is concatenated carries gradients: one
differentiable pass over every position once. Uncached, it runs all blocks again for each new one, as the released code does, and spares
nothing (``sparing``); that is four times the work and the same numbers, and exists to prove just that.

Lanes are ragged: a block's places that are not ``valid`` are seen by nobody. Masks are four-dimensional and ours, so padding, hidden
pictures and causality are one rule, the same for every family.

Shapes: B lanes, L places of a block, S places so far, P position axes (1, or 3 for M-RoPE), D width.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from monologue.backends.base import BackendError
from monologue.backends.kept import empty
from monologue.backends.perception.attended import Row, through
from monologue.backends.perception.sparing import ends

SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")
"""Settings by which a family changes what its last layer says (Granite, Cohere, Gemma 2)."""


@dataclass(frozen=True, slots=True)
class Block:
    """What is read at once."""

    embeds: Tensor
    """(B, L, D)."""
    valid: Tensor
    """(B, L) bool."""
    positions: Tensor
    """(P, B, L)."""
    picture: Tensor
    """(B, L) bool: places of the picture itself."""
    blind: Tensor
    """(B, L) bool: places that do not see the picture."""

    @property
    def last(self) -> Tensor:
        """(B,) each lane's last valid place; 0 where it has none."""
        return (self.valid * torch.arange(self.valid.shape[1], device=self.valid.device)).amax(1)

    def then(self, more: Block) -> Block:
        """Both, one after the other."""
        names = ("embeds", "valid", "picture", "blind")
        embeds, valid, picture, blind = (torch.cat([getattr(self, name), getattr(more, name)], dim=1) for name in names)
        return Block(embeds, valid, torch.cat([self.positions, more.positions], dim=2), picture, blind)

    def bare(self) -> Block:
        """Without what is fed, for whoever needs only to know what may be seen."""
        return replace(self, embeds=self.embeds[..., :0], positions=self.positions[..., :0])


def text(embeds: Tensor, valid: Tensor, positions: Tensor, *, blind: bool) -> Block:
    """A block without picture, none or all of whose places are blind."""
    nowhere = torch.zeros_like(valid)
    return Block(embeds, valid, positions, nowhere, torch.full_like(valid, blind))


def onward(following: Tensor, valid: Tensor) -> Tensor:
    """(B, L) positions one after another from ``following`` (B,); a place that is not ``valid`` (B, L) takes none."""
    steps = valid.long()
    return following.unsqueeze(1) + steps.cumsum(1) - steps


def bare(model: Any) -> Any:
    """Without PEFT's wrapper; its layers stand in the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: Any) -> Any:
    """The language model inside, of a model that sees or of a text model. Raises BackendError where its numbers would be others here."""
    name = type(model).__name__
    if not hasattr(model, "model"):
        raise BackendError(f"expected a model with its decoder in 'model' (the Llama, Qwen, LLaVA kind), got {name}")
    found = getattr(model.model, "language_model", model.model)
    kinds = set(getattr(found.config, "layer_types", None) or [_window(found.config)])
    if kinds != {"full_attention"}:
        raise BackendError(f"expected full attention in every layer of {name}, got {', '.join(sorted(kinds))}")
    if getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None):
        raise BackendError(f"expected a model that sees at its input alone, got {name}, whose tower feeds later layers, too (deepstack)")
    for scale in SCALES:
        value = getattr(found.config, scale, None)
        if value is not None and value != 1:
            raise BackendError(f"expected logits as the last layer gives them, got {name} with {scale}={value!r}")
    return found


def _window(config: Any) -> str:
    """Of a configuration that does not tell its layers apart."""
    forgets = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return f"sliding_window={config.sliding_window}" if forgets else "full_attention"


class Reader:
    """State of a batch that is being read."""

    def __init__(self, model: Any, *, cached: bool = True) -> None:
        """Raises ValueError for a model that would drop what is kept."""
        self._model = decoder(model)
        if cached and model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self._model.layers):
            raise ValueError("gradient checkpointing drops keys and values; turn it off, or think(..., cached=False)")
        self._plain = self._model.config._attn_implementation != "eager"  # the eager function knows no causality but a mask's
        self.cache: Any = empty() if cached else None
        self._read: Block | None = None

    @property
    def axes(self) -> int:
        """P."""
        return len(self._whole.positions)

    def read(self, block: Block) -> Tensor:
        """Last hidden states (B, L, D)."""
        fed, offset = self._join(block)
        return self._run(fed, offset, Row(None, None))[:, -block.valid.shape[1] :]

    def arrive(self, block: Block, *, row: bool = False, graph: bool = False) -> tuple[Tensor, Tensor | None]:
        """Last hidden state (B, D) of each lane's last valid place, and with ``row`` the attention (B, S) of that place, hidden pictures
        weighed, with ``graph`` differentiable.
        """
        fed, offset = self._join(block)
        seen: Tensor = self._whole.valid
        keys = torch.arange(seen.shape[1], device=seen.device)
        at = block.last + seen.shape[1] - block.valid.shape[1]  # (B,)
        asked = Row(at - offset, seen & (keys <= at[:, None]), graph) if row else Row(None, None)
        with nullcontext() if self.cache is None else ends(self._model.layers[-1], at - offset):
            hidden = self._run(fed, offset, asked)
        return hidden[torch.arange(len(at), device=at.device), at - offset], asked.weights if row else None

    @property
    def _whole(self) -> Block:
        assert self._read is not None
        return self._read

    def _join(self, block: Block) -> tuple[Block, int]:
        """Behind what was read: what is to be fed, and its first place."""
        new = block if self.cache is None else block.bare()
        self._read = new if self._read is None else self._read.then(new)
        return (self._read, 0) if self.cache is None else (block, self._read.valid.shape[1] - block.valid.shape[1])

    def _run(self, fed: Block, offset: int, asked: Row) -> Tensor:
        plain = self._plain and _causal(self._whole, offset)
        with through(self._model.config, asked) as more:
            out = self._model(
                inputs_embeds=fed.embeds,
                attention_mask=None if plain else _mask(self._whole, offset, fed.embeds.dtype),
                position_ids=fed.positions[0] if len(fed.positions) == 1 else fed.positions,
                past_key_values=self.cache,
                use_cache=self.cache is not None,
                **more,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden


def _causal(whole: Block, offset: int) -> bool:
    """Whether every place sees just what came before it, in a block that is all there is, or a single place: attention is twice as fast
    when it is not told so by a mask.
    """
    alone = offset in (0, whole.valid.shape[1] - 1)
    return alone and bool(whole.valid.all()) and not bool((whole.blind[:, offset:].any(1) & whole.picture.any(1)).any())


def _mask(whole: Block, offset: int, numbers: torch.dtype) -> Tensor:
    """(B, 1, L, S) to be added to scores. Finite, because a padded query that sees nothing must not become nan."""
    keys = torch.arange(whole.valid.shape[1], device=whole.valid.device)
    causal = keys <= keys[offset:, None]  # (L, S)
    open_ = causal & whole.valid[:, None] & ~(whole.blind[:, offset:, None] & whole.picture[:, None])  # (B, L, S)
    lowest = max(torch.finfo(numbers).min, torch.finfo(torch.float32).min)
    return torch.zeros_like(open_, dtype=numbers).masked_fill(~open_, lowest).unsqueeze(1)
