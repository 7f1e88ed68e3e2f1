"""IVT-LR: reasoning in latent space with pictures re-read on the way (arXiv 2510.12603), over any Hugging Face vision-language model.

After the prompt, n steps each feed the model its own last hidden state and the embeddings of K patches that it attended to; then words
follow. Nothing is added to the model: this is a way of running it. ``modes.Mode`` holds each choice that paper and released code make.

Departures from the released code that change no number: every position is read once (keys and values are kept), one attention row is
computed instead of all maps, lanes of a batch may have prompts, pictures and numbers of steps of their own. Departures that do, and are
settings: states carry gradients (released: detached, so what is thought is never trained by what it is thought for), positions are those
that the model was trained with, order as in the paper.

    reasoner = LatentReasoner(model, OURS)
    thoughts = reasoner.think(prompts(model, asked), steps=3)       # latent steps
    logits = reasoner.read(thoughts, ids, valid)                    # teacher-forced words after them, (B, T, V)

Exact replay: states follow from ids, pictures and chosen patches alone; give ``chosen`` back and every number returns.

Shapes: B lanes, n steps, K patches a step, D width, T words, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monologue.backends.base import BackendError
from monologue.backends.perception.modes import MODES, OURS, PAPER, REFERENCE, Mode
from monologue.backends.perception.prompts import Asked, Prompts, prompts
from monologue.backends.perception.reading import bare, decoder, onward, text
from monologue.backends.perception.thoughts import Edits, Halt, Thinking, Thoughts

__all__ = ["MODES", "OURS", "PAPER", "REFERENCE", "Asked", "Edits", "LatentReasoner", "Mode", "Prompts", "Thoughts", "prompts"]


class LatentReasoner:
    """Takes latent steps with ``model`` (a ``...ForConditionalGeneration`` or ``...ForCausalLM``, PEFT's wrapper around it or not), in its
    own dtype and on its device.
    """

    def __init__(self, model: Any, mode: Mode = OURS) -> None:
        """Raises BackendError for a model or a pause that cannot be run this way."""
        self.model, self.mode = bare(model), mode
        decoder(self.model)
        words = int(self.model.get_input_embeddings().num_embeddings)
        if mode.pause_id is not None and not 0 <= mode.pause_id < words:
            raise BackendError(f"expected a pause_id from 0 to {words - 1}, got {mode.pause_id!r}")

    def think(
        self,
        given: Prompts,
        steps: int | Sequence[int],
        *,
        chosen: Tensor | None = None,
        edits: Edits | None = None,
        seeds: Sequence[int] | None = None,
        halt: Halt | None = None,
        cached: bool = True,
    ) -> Thoughts:
        """Takes ``steps`` latent steps after the prompts, the same for all lanes or one number a lane.

        ``chosen`` (B, n, any K) takes these patches instead of choosing (replay, oracles). ``seeds`` (one a lane) are for random patches.
        ``halt(step, states (B, D))`` gives (B,) bool: lanes that stop before this step. ``cached=False`` reads everything again at each
        step, for comparison. Raises RequestRefused for prompts and patches that the mode cannot honour, ValueError for arguments that
        do not fit.
        """
        lanes = len(given.valid)
        counts = [steps] * lanes if isinstance(steps, int) else list(steps)
        if len(counts) != lanes or min(counts) < 0:
            raise ValueError(f"expected a number of steps from 0, for all or for each of {lanes} lanes, got {steps!r}")
        wanted = torch.tensor(counts, device=given.valid.device)
        return Thinking(self.model, self.mode, given, wanted, seeds, cached).run(chosen, edits or Edits(), halt)

    def read(self, thoughts: Thoughts, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) that predict each of ``ids`` (B, T) after the thoughts. ``valid`` (B, T) bool where lanes are ragged, padded on
        the right; what is predicted for padding means nothing.
        """
        there = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        hidden = thoughts.last.unsqueeze(1)  # (B, 1, D)
        if ids.shape[1] > 1:
            embeds = self.model.get_input_embeddings()(ids[:, :-1])
            places = onward(thoughts.following, there[:, :-1]).expand(thoughts.reader.axes, -1, -1)
            block = text(embeds, there[:, :-1], places, blind=self.mode.bottleneck != "off")
            hidden = torch.cat([hidden, thoughts.reader.read(block)], dim=1)  # (B, T, D)
        return self.say(hidden)

    def hear(self, thoughts: Thoughts, ids: Tensor, going: Tensor | None = None) -> Tensor:
        """Feeds one word a lane, ``ids`` (B,), to those ``going`` (B,) bool, and moves ``thoughts`` on; logits (B, V) of the next word."""
        valid = torch.ones_like(ids, dtype=torch.bool) if going is None else going
        places = thoughts.following[:, None].expand(thoughts.reader.axes, -1, -1)  # (P, B, 1)
        block = text(self.model.get_input_embeddings()(ids[:, None]), valid[:, None], places, blind=self.mode.bottleneck != "off")
        hidden = thoughts.reader.read(block)[:, 0]
        thoughts.last = torch.where(valid[:, None], hidden, thoughts.last)
        thoughts.following = thoughts.following + valid.long()
        return self.say(thoughts.last)

    def say(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states: of ``thoughts.last`` for the next word, of ``thoughts.states`` for what a step nearly said."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits
