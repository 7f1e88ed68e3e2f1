"""The speaker: one small policy that takes every seat of the hops world, out loud. A thinker begins with its weights.

    see     the picture tower alone: every visual token names its cell's letter and colour on the tied word embeddings, and, through a
            linear layer that is thrown away, the letter after the arrow (a Visual Words loss). A second matrix for the second letter, since
            a bag of words could not tell ``a -> c`` from ``c -> a``.
    drill   the language model looks up: many single hops from one picture, in the words of an oracle's monologue, in random order.
    seats   whole parts of both seats, in the layout of the codec: the questioner's without the picture, the answerer's with it.

Tower and word embeddings stand still after ``see``. The drill has no two hops in a row and no problem in it.

Shapes: B rows, T ids, N patches of all pictures, D width, V vocabulary; 12 visual tokens a picture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monologue.tasks.base import Problem
from monologue.tasks.hops import COLOURS, COLUMNS, LETTERS, ROWS, Board, Drawing, Hops, draw_board, paint
from monologue.training.starter.batches import IGNORED, Batch, Part, Words, patches
from monologue.training.starter.fit import Curve, Stage, fit

CELLS = ROWS * COLUMNS
PICTURE = "<|vision_start|> " + "<|image_pad|> " * CELLS + "<|vision_end|>"
CHOICES = " ".join(f"<choice> {colour}" for colour in COLOURS)


class Speaker(nn.Module):
    """A speaker under training."""

    def __init__(self, model: Any, words: Words) -> None:
        super().__init__()
        self.model, self.words = model, words
        width = model.get_input_embeddings().embedding_dim
        self.second = nn.Linear(width, width, bias=False)
        """Reads the letter after the arrow; not part of the policy."""
        self.names = torch.tensor([words.table[name] for name in LETTERS])
        self.colours = torch.tensor([words.table[name] for name in COLOURS])

    def see(self, pixels: Tensor) -> Tensor:
        """(N, values) to (B, 12, D)."""
        batch = len(pixels) // (4 * CELLS)
        grid = torch.tensor([[1, 2 * ROWS, 2 * COLUMNS]]).expand(batch, 3)
        seen: Tensor = self.model.model.visual(pixels, grid_thw=grid).pooler_output
        return seen.view(batch, CELLS, -1)

    def readings(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of each cell's letter, of the letter that follows, of its colour: (B, 12, 12), (B, 12, 12), (B, 12, 6)."""
        seen, table = self.see(pixels), self.model.get_input_embeddings().weight.detach()
        return seen @ table[self.names].T, self.second(seen) @ table[self.names].T, seen @ table[self.colours].T

    def see_loss(self, pixels: Tensor, boards: Sequence[Board]) -> Tensor:
        """Mean cross-entropy of the three readings, summed."""
        wanted = truth(boards)
        found = self.readings(pixels)
        return torch.stack([F.cross_entropy(one.flatten(0, 1), wanted[..., k].flatten()) for k, one in enumerate(found)]).sum()

    def spoken(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (S, V) and labels (S,) where the policy speaks; rows with a picture have it right after two ids."""
        embed = self.model.get_input_embeddings()
        pads = batch.ids == self.words.table["<|image_pad|>"]
        x = embed(batch.ids)
        if batch.pixels is not None:
            with torch.no_grad():
                seen = self.see(batch.pixels)
            x = x.masked_scatter(pads.unsqueeze(-1), seen)
        positions = self.positions(batch.ids, bool(pads.any()))
        out = self.model.model.language_model(inputs_embeds=x, position_ids=positions, attention_mask=None, use_cache=False)
        said = batch.labels[:, 1:] != IGNORED
        return out.last_hidden_state[:, :-1][said] @ embed.weight.T, batch.labels[:, 1:][said]

    def speak_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of what the policy says. No gradient enters the picture tower."""
        return F.cross_entropy(*self.spoken(batch))

    def positions(self, ids: Tensor, pictured: bool) -> Tensor:
        """(3, B, T): the model's own M-RoPE; all rows of a batch have their picture in the same place, or none."""
        plain = torch.arange(ids.shape[1]).expand(3, 1, -1)
        if pictured:
            kinds = (ids[:1] == self.words.table["<|image_pad|>"]).int()
            grid = torch.tensor([[1, 2 * ROWS, 2 * COLUMNS]])
            plain = self.model.model.get_rope_index(ids[:1], mm_token_type_ids=kinds, image_grid_thw=grid)[0]
        return plain.expand(3, len(ids), -1)

    def language(self) -> list[tuple[str, nn.Parameter]]:
        """Without the word embeddings: the tower's tokens are written in them."""
        return [(name, p) for name, p in self.model.named_parameters() if ".visual." not in name and "embed_tokens" not in name]

    def tower(self) -> list[tuple[str, nn.Parameter]]:
        found = [(name, p) for name, p in self.model.named_parameters() if ".visual." in name]
        return [*found, ("second", self.second.weight)]


def truth(boards: Sequence[Board]) -> Tensor:
    """(B, 12, 3) index of letter, letter after the arrow, colour."""
    names, colours = list(LETTERS), list(COLOURS)
    return torch.tensor([[[names.index(c.letter), names.index(c.follows), colours.index(c.colour)] for c in board] for board in boards])


def boards(seed: str, size: int) -> Iterator[tuple[Tensor, list[Board]]]:
    """Batches of pictures alone."""
    rng = random.Random(seed)
    while True:
        found = [draw_board(rng) for _ in range(size)]
        yield patches([paint(board, rng.getrandbits(32)) for board in found]), found


def drill(rng: random.Random, board: Board, turns: int) -> list[Part]:
    """Single look-ups in random order."""
    parts: list[Part] = [(f"<bos> <user> {PICTURE}", False)]
    for cell in rng.choices(board, k=turns):
        hop = rng.random() < 0.7
        parts += [(f"what follows {cell.letter}" if hop else f"what colour is {cell.letter}", False)]
        parts += [(cell.follows if hop else cell.colour, True)]
    return parts


def drills(words: Words, stage: Stage, seed: int) -> Iterator[Batch]:
    """Batches of them."""
    rng = random.Random(f"{stage.name}/{seed}")
    while True:
        found = [draw_board(rng) for _ in range(stage.batch)]
        pixels = patches([paint(board, rng.getrandbits(32)) for board in found])
        yield Batch(*words.batch([drill(rng, board, stage.turns) for board in found]), pixels)


def asker(problem: Problem) -> list[Part]:
    """The questioner's part."""
    assert problem.oracle is not None and problem.gold is not None
    parts: list[Part] = [(f"<bos> <user> {problem.question} {CHOICES} <assistant>", False)]
    for turn in problem.oracle:
        parts += [(f"<look> {turn.question} <eos>", True), (f"<tool> {turn.reply} <assistant>", False)]
    return [*parts, (f"<conclude> {problem.choices[problem.gold]} <eos>", True)]


def seer(problem: Problem) -> list[Part]:
    """The answerer's part."""
    parts: list[Part] = []
    for turn in problem.oracle or ():
        opening = "<user>" if parts else f"<bos> <user> {PICTURE}"
        parts += [(f"{opening} {turn.question} <assistant>", False), (f"{turn.reply} <eos>", True)]
    return parts


def seats(words: Words, stage: Stage, seed: int, task: Hops) -> Iterator[Batch]:
    """Batches of one seat or the other, by turns; the answerer's with a share of drills, which keep what was learned."""
    rng = random.Random(f"{stage.name}/{seed}")
    for number, start in enumerate(_count(stage.first, stage.batch)):
        problems = [task.problem("train", index, seed) for index in range(start, start + stage.batch)]
        if number % 3 == 0:
            yield Batch(*words.batch([asker(problem) for problem in problems]), None)
            continue
        pixels = patches([problem.pictures[0]() for problem in problems])
        rows = [seer(one) if rng.random() < 0.8 else drill(rng, _board(one), stage.turns) for one in problems]
        yield Batch(*words.batch(rows), pixels)


def _board(problem: Problem) -> Board:
    drawing = problem.pictures[0]
    assert isinstance(drawing, Drawing)
    return drawing.board


def _count(first: int, size: int) -> Iterator[int]:
    while True:
        yield first
        first += size


def learn(speaker: Speaker, stage: Stage, seed: int, curve: Curve, task: Hops) -> None:
    """Runs one stage; ``seats`` on problems of the task. Raises ValueError for a name that it does not know."""
    if stage.name == "see":
        fit(stage, speaker.tower(), boards(f"see/{seed}", stage.batch), lambda pair: speaker.see_loss(*pair), curve)
    elif stage.name in ("drill", "seats"):
        stream = drills(speaker.words, stage, seed) if stage.name == "drill" else seats(speaker.words, stage, seed, task)
        fit(stage, speaker.language(), stream, speaker.speak_loss, curve, lambda: examine(speaker, 100, task))
    else:
        raise ValueError(f"unknown stage {stage.name!r}; expected see, drill or seats")


@torch.no_grad()
def examine(speaker: Speaker, n: int, task: Hops) -> dict[str, float]:
    """On validation problems: share of cells read right in all three, of drilled look-ups, of whole parts said word for word."""
    problems = list(task.problems("validation", n))
    drawn = [_board(problem) for problem in problems]
    pixels = patches([problem.pictures[0]() for problem in problems])
    read = torch.stack([one.argmax(-1) for one in speaker.readings(pixels)], dim=-1)
    rng = random.Random("examine")
    batches = {
        "look-ups": Batch(*speaker.words.batch([drill(rng, board, 12) for board in drawn]), pixels),
        "questioner": Batch(*speaker.words.batch([asker(problem) for problem in problems]), None),
        "answerer": Batch(*speaker.words.batch([seer(problem) for problem in problems]), pixels),
    }
    found = {"cells": float((read == truth(drawn)).all(-1).float().mean())}
    for name, batch in batches.items():
        logits, labels = speaker.spoken(batch)
        hits = (logits.argmax(-1) == labels).float()
        counts = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
        whole = torch.stack([one.min() for one in torch.split(hits, counts)])
        found[name] = float((hits if name == "look-ups" else whole).mean())
    return {name: round(value, 4) for name, value in found.items()}
