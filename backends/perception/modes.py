"""How a latent step is made: every choice of IVT-LR (arXiv 2510.12603) as a separate setting, and three published sets of them.

A latent step feeds the model's last hidden state back as its next input, followed (``state-first``) or preceded (``patches-first``) by the
embeddings of K chosen places of the picture. The paper and its released code disagree on nearly every other point, so each is a field here:

    PAPER       [state][patches] as formula, figure and algorithm 1 have it; gradients through the states (it speaks of no truncation)
    REFERENCE   the released code: [patches][state], positions counted flat (M-RoPE off), states detached, patches in the order of an
                unsorted top-k; what it cannot do (a second picture, fewer patches than it wants) is refused here instead of going wrong
    OURS        the default: patches before the state, so that a step ends where the next word is said (0.998 against 0.69 with the paper's
                order, ``bench/hops.py``), the model's own positions, gradients through the states

What was left out: a choice of layers or heads for selection (all of them, averaged).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to take latent steps. Raises ValueError for values that are not listed and for sets that contradict themselves."""

    order: Literal["state-first", "patches-first"] = "patches-first"
    """Of a step's state and its patches in the sequence."""
    thought: Literal["state", "pause", "none"] = "state"
    """What a step feeds back: the last hidden state (after the final norm), the embedding of ``pause_id``, or nothing."""
    patches: Literal["attended", "random", "none"] = "attended"
    """Which patches a step re-reads: those attended to most, a fair draw, or none."""
    k: int = 32
    """Patches a step, at most."""
    selects: Literal["row", "state"] = "row"
    """Whose attention chooses: the position that made the state (as released), or the state itself as it is read back."""
    choice: Literal["hard", "through"] = "hard"
    """What choosing teaches: nothing, as published; or its attention learns as if it had mixed patches, though the chosen ones are fed
    (straight-through).
    """
    reuse: bool = False
    """A patch may be chosen again by a later step."""
    positions: Literal["mrope", "flat", "placed"] = "mrope"
    """The model's own, the prompt's kept and every latent position one further; ``flat``: 0, 1, 2 for all; ``placed``: as ``mrope``, but a
    patch keeps the position it has in the picture."""
    gradients: Literal["full", "detached"] = "full"
    """Whether states carry gradients from the steps that read them to those that made them. Patches always do."""
    bottleneck: Literal["off", "question", "picture"] = "off"
    """From where on the picture itself is hidden, so that only chosen patches are seen: nowhere, after the prompt, or after the picture,
    where the question cannot see it either. Attention for choosing looks past it."""
    arrangement: Literal["raster", "released"] = "raster"
    """Order of a step's patches: by place, or as an unsorted top-k happens to leave them."""
    scarce: Literal["fewer", "refuse"] = "fewer"
    """Where fewer patches are left than wanted."""
    pause_id: int | None = None
    """Token whose embedding a pause feeds."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for field in fields(self):
            kind, value = kinds[field.name], getattr(self, field.name)
            if get_origin(kind) is Literal and value not in [one for one in get_args(kind) if isinstance(value, str)]:
                raise ValueError(f"{field.name} must be one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")
        if type(self.reuse) is not bool or not (self.pause_id is None or type(self.pause_id) is int):
            raise ValueError(f"reuse must be true or false and pause_id a token id, got {self.reuse!r} and {self.pause_id!r}")
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"k must be a whole number from 1 (patches='none' takes none), got {self.k!r}")
        if self.selects == "state" and (self.order == "patches-first" or self.thought == "none"):
            raise ValueError("selects='state' needs the state in the sequence before its patches; use order='state-first' and a thought")
        if self.choice == "through" and self.patches != "attended":
            raise ValueError(f"choice='through' teaches attention to choose, so it needs patches='attended', got {self.patches!r}")
        if (self.thought == "pause") != (self.pause_id is not None):
            raise ValueError(f"pause_id must be given with thought='pause', and only then, got {self.pause_id!r} with {self.thought!r}")


OURS = Mode()
PAPER = Mode(order="state-first", positions="flat")
REFERENCE = Mode(positions="flat", gradients="detached", arrangement="released", scarce="refuse")
MODES = {"ours": OURS, "paper": PAPER, "reference": REFERENCE}
