"""Progressive internalisation: a model that says its reasoning learns to think it, one step after another (IVT-LR, arXiv 2510.12603; the
curriculum is that of Deng et al. 2405.14838 and Coconut 2412.06769 with one latent step for one step of the rationale).

    stage 0     question, step 1, step 2, ..., answer               all in words
    stage s     question, s latent steps, step s + 1, ..., answer   loss on the words that are left; question and latents carry none

Of a dialogue, the replies alone may be said (``words = "replies"``). Where a question only repeats what was just found, that is what lets
the second step be learned: after one reply the next follows at once, so the place that says a reply is the place that looks up the next,
and putting a state there in its stead changes nothing but who wrote it. With the questions in between, a state that begins a step must
first say a question's first word and, a stage later, look up instead: without an anchor no stage of ours got over that, with one all did
(``bench/hops.py``, arm ``dialogue``).

``gradients`` decides what trains a latent state: ``full`` back-propagates through all latent steps; ``detached`` is the released code, in
which no consumer of a state ever reaches its producer; ``anchor`` > 0 adds a loss that needs no graph across steps: the state that begins
step i shall name the first word of what step i found (of the family of CODI's and SIM-CoT's step supervision).

``looks`` > 0 adds a loss on the attention that chooses patches, where a lesson says which ones a step needs: cross-entropy of the shares
that the picture's places have in it. Choosing by itself carries no gradient; ``choice = "through"`` gives it an indirect one.

``stop``: ``fixed`` takes as many latent steps as there were stages for every problem, as the paper does; ``learned`` takes one for each
step that a problem has. A state then says ``think`` (a word of the tokenizer that nothing else uses) while it has not finished, and
whoever runs the model goes on while that is likelier than not. The anchor is read with that word left out, so the two losses share no
probability.

Left out: resetting the optimizer between stages (Coconut does, IVT-LR does not; the learning rate warms up anew), and the released code's
length limits.

Shapes: B rows, n latent steps, D width, T words that are left, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from monologue.backends.inputs import Inputs
from monologue.backends.perception.ivtlr import LatentReasoner, Thoughts
from monologue.backends.perception.prompts import Asked, Prompts
from monologue.traces.images import Picture
from monologue.training.rationales import Rationale, RationaleError

IGNORED = -100
Ids = tuple[int, ...]


class Voice(Protocol):
    """A rationale in a model's own tokens. The front door has one for every model with a codec."""

    def prompt(self, rationale: Rationale, pictures: Sequence[Picture]) -> Ids:
        """Question, choices and pictures, placeholders expanded; thoughts or words follow its last id."""
        ...

    def said(self, text: str) -> Ids:
        """Words in the midst of a reply."""
        ...

    def ending(self, answer: str) -> Ids:
        """The answer and the end of the reply."""
        ...


@dataclass(frozen=True, slots=True)
class Lesson:
    """One rationale, ready to be learned."""

    asked: Asked
    """Prompt and pictures."""
    steps: tuple[Ids, ...]
    """Each step in words."""
    gists: Ids
    """First id of what each step found."""
    ending: Ids
    """Answer and stop."""
    chosen: tuple[Ids, ...] = ()
    """Patches that each latent step is to read again, as an oracle knows them: it takes them, or with ``looks`` shall choose them; empty:
    the model chooses.
    """

    def left(self, thought: int) -> Ids:
        """What is still said after so many latent steps."""
        return tuple(token for step in self.steps[thought:] for token in step) + self.ending


def lesson(rationale: Rationale, voice: Voice, inputs: Inputs, replies: bool = False, looks: bool = False) -> Lesson:
    """In the tokens and pixels of one checkpoint; ``replies``: of a step only what it found; ``looks``: with the patches that steps need.

    Raises CodecError, PictureError, RequestRefused, RationaleError where nobody says which patches those are.
    """
    if looks and len(rationale.way) != len(rationale.steps):
        raise RationaleError(f"looks wants a patch for each of {len(rationale.steps)} steps, but {rationale.id!r} names {rationale.way!r}")
    images = [picture() for picture in rationale.pictures]
    ids = voice.prompt(rationale, [Picture("", image) for image in images])  # nothing is recorded, so nobody asks for a hash
    patches = ids.count(inputs.image_token_id) if inputs.image_token_id is not None else 0
    if looks and patches != rationale.cells:
        told = f"pictures seen in as many patches as {rationale.id!r} has parts, {rationale.cells}, but this model sees {patches}"
        raise RationaleError(f"looks wants {told}; change its image processor's pixels, or leave looks out")
    pixels, grids = inputs.pixels(images) if images else (None, None)
    asked = Asked(ids, pixels, grids, inputs.positions(ids, grids))
    steps = tuple(voice.said(step.found if replies else step.text) for step in rationale.steps)
    gists, needed = tuple(voice.said(step.gist)[0] for step in rationale.steps), tuple((patch,) for patch in rationale.way)
    return Lesson(asked, steps, gists, voice.ending(rationale.answer), needed if looks else ())


@dataclass(frozen=True, slots=True)
class Objective:
    """What is asked of words and of states."""

    anchor: float = 0.0
    """Weight of the anchor loss; 0 leaves it out."""
    looks: float = 0.0
    """Weight of the loss on the attention that chooses; 0 leaves it out."""
    think: int | None = None
    """Id that says "not finished"; None: the number of steps is fixed."""
    banned: Ids = ()
    """Ids that are never said."""

    def latents(self, lessons: Sequence[Lesson], stage: int) -> list[int]:
        """Latent steps of each row in a stage: a learned stop takes one for each step of the rationale, a fixed number is what it is."""
        return [stage if self.think is None else min(stage, len(one.steps)) for one in lessons]


@dataclass(frozen=True, slots=True)
class Lost:
    """A batch's losses, nats."""

    words: Tensor
    """Mean over the words that are left."""
    anchor: Tensor | None
    """Mean over latent steps that have a gist."""
    stop: Tensor | None
    """Mean over latent steps: that each says it is not the last."""
    looks: Tensor | None
    """Mean over the patches that steps need."""

    def total(self, objective: Objective) -> Tensor:
        """With the objective's weights."""
        parts = ((self.anchor, objective.anchor), (self.stop, 1.0), (self.looks, objective.looks))
        return self.words + sum(weight * part for part, weight in parts if part is not None)


def internalisation(
    reasoner: LatentReasoner, given: Prompts, lessons: Sequence[Lesson], stage: int, objective: Objective, seed: int
) -> Lost:
    """Losses of a batch at a stage; ``seed`` is for modes that draw patches."""
    counts = objective.latents(lessons, stage)
    seeds = [seed * 100_003 + lane for lane in range(len(lessons))] if reasoner.mode.patches == "random" else None
    chosen = None if objective.looks else forced(lessons, stage)
    thoughts = reasoner.think(given, counts, seeds=seeds, chosen=None if chosen is None else chosen.to(given.embeds.device))
    ids, valid = (one.to(given.embeds.device) for one in left(lessons, counts))
    logits = _without(reasoner.read(thoughts, ids, valid), objective.banned)  # (B, T, V)
    words = F.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~valid, IGNORED).flatten(), ignore_index=IGNORED)
    anchor = _anchored(reasoner, thoughts, lessons, counts, objective) if objective.anchor and stage else None
    stop = _unfinished(reasoner, thoughts, counts, objective) if objective.think is not None and stage else None
    looks = _looked(thoughts, lessons, counts) if objective.looks and stage else None
    return Lost(words, anchor, stop, looks)


def left(lessons: Sequence[Lesson], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids that are still said (B, T), and where a row has one (B, T) bool."""
    rows = [one.left(count) for one, count in zip(lessons, counts, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


def forced(lessons: Sequence[Lesson], steps: int) -> Tensor | None:
    """(B, steps, K) patches of lessons that say them; None where they do not."""
    if not steps or not all(one.chosen for one in lessons):
        return None
    most = max(len(step) for one in lessons for step in one.chosen)
    return torch.tensor([[[*step, *[-1] * most][:most] for step in (*one.chosen, *[()] * steps)][:steps] for one in lessons])


def _without(logits: Tensor, banned: Sequence[int]) -> Tensor:
    return logits.index_fill(-1, torch.tensor(banned, device=logits.device), -torch.inf) if banned else logits


def _anchored(
    reasoner: LatentReasoner, thoughts: Thoughts, lessons: Sequence[Lesson], counts: Sequence[int], objective: Objective
) -> Tensor:
    most = thoughts.states.shape[1]
    rows = [[*one.gists[:count], *[IGNORED] * most][:most] for one, count in zip(lessons, counts, strict=True)]
    silent = (*objective.banned, *(() if objective.think is None else (objective.think,)))
    logits = _without(reasoner.say(thoughts.states), silent)  # (B, n, V)
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor(rows, device=logits.device).flatten(), ignore_index=IGNORED)


def _looked(thoughts: Thoughts, lessons: Sequence[Lesson], counts: Sequence[int]) -> Tensor:
    """Attention chooses what lessons say that steps need."""
    if thoughts.scores is None or not thoughts.scores.requires_grad or not any(one.chosen for one in lessons):
        raise ValueError("looks needs attended patches with choice='through', and lessons that say which patches a step needs")
    needed = torch.zeros_like(thoughts.scores)  # (B, n, J)
    for lane, (one, count) in enumerate(zip(lessons, counts, strict=True)):
        for step, patches in enumerate(one.chosen[:count]):
            needed[lane, step, list(patches)] = 1.0
    least = torch.finfo(thoughts.scores.dtype).tiny
    shares = thoughts.scores / thoughts.scores.sum(-1, keepdim=True).clamp(min=least)
    return -(needed * shares.clamp(min=least).log()).sum() / needed.sum().clamp(min=1)


def _unfinished(reasoner: LatentReasoner, thoughts: Thoughts, counts: Sequence[int], objective: Objective) -> Tensor:
    most = thoughts.states.shape[1]
    rows = [[*[objective.think] * count, *[IGNORED] * most][:most] for count in counts]
    logits = _without(reasoner.say(thoughts.states), objective.banned)
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor(rows, device=logits.device).flatten(), ignore_index=IGNORED)
