"""Endless practice for the starter policies: pictures to patches, dialogues to ids and masks. Same seed, same stream.

B sequences, T tokens, N patches of a picture (36 of a shapes world's), P pixel values of a patch.

The layout of a sequence is that of ``monologue.agents.codec.TinyCodec``; a test holds the two equal. Loss falls only on what a
policy says itself: replies of the answerer, look-ups and conclusions of the questioner, each with its ``<eos>``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from monologue.tasks.shapes import language
from monologue.tasks.shapes.draw import paint
from monologue.tasks.shapes.families import World
from monologue.tasks.shapes.perception import KINDS, ask_exists, ask_value, look, practice_scene
from monologue.tasks.shapes.scene import ATTRIBUTES, CELLS, SEEN, Scene, cells_of

IGNORED = -100
TRAIN = World(SEEN, SEEN)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
VISUAL_TOKENS = 9
Part = tuple[str, bool]
"""Words, and whether the policy says them itself."""


def patches(images: Sequence[Image]) -> Tensor:
    """What ``Qwen2VLImageProcessor`` makes of pictures of one size, sides multiples of 28, for a whole batch at once: (B * N, P)."""
    pixels = (np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255 - MEAN) / STD  # (B, height, width, 3)
    batch, high, wide = len(images), images[0].height // 28, images[0].width // 28
    blocks = pixels.reshape(batch, high, 2, 14, wide, 2, 14, 3)  # rows: block, in block, pixel; columns alike; colour
    blocks = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # block row, block column, row, column, colour, pixel, pixel
    flat = blocks.reshape(batch * high * wide * 4, 3, 1, 14 * 14)
    return torch.from_numpy(np.repeat(flat, 2, axis=2).reshape(len(flat), -1))


class Words:
    """Words to ids by table look-up: the tokenizer's own answer for our closed vocabulary, without its call overhead."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.table: dict[str, int] = tokenizer.get_vocab()
        self.pad = self.table["<pad>"]

    def __call__(self, text: str) -> list[int]:
        return [self.table[word] for word in text.split()]

    def sequence(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """Ids and labels; a label is the id itself where the policy speaks, else IGNORED."""
        ids: list[int] = []
        labels: list[int] = []
        for text, spoken in parts:
            new = self(text)
            ids += new
            labels += new if spoken else [IGNORED] * len(new)
        return ids, labels

    def batch(self, rows: Sequence[Sequence[Part]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids and labels, each (B, T)."""
        pairs = [self.sequence(parts) for parts in rows]
        longest = max(len(ids) for ids, _ in pairs)
        ids = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in pairs])
        labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in pairs])
        return ids, labels


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences and their pictures."""

    ids: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T), IGNORED where nothing is learned."""
    pixels: Tensor | None
    """(B * N, P)"""
    scenes: tuple[Scene, ...] = ()


def picture_words() -> str:
    return "<|vision_start|> " + "<|image_pad|> " * VISUAL_TOKENS + "<|vision_end|>"


def caption(scene: Scene) -> str:
    """Every object in reading order: ``b2 small solid red circle ,``."""
    return " ".join(f"{cell} {t.size} {t.fill} {t.colour} {t.shape} ," for cell, t in scene.items())


def interview(rng: random.Random, scene: Scene, world: World, kinds: Sequence[str]) -> list[Part]:
    """One picture and many questions, as the answerer's stream holds them."""
    parts: list[Part] = [(f"<bos> <user> {picture_words()}", False)]
    for kind in kinds:
        question, reply = language.DESCRIBE, caption(scene)
        if kind != "caption":
            found = look(rng, scene, world, kind)
            if found is None:
                continue
            question, reply = found.question, found.reply
        opening = "" if len(parts) == 1 else "<user> "
        parts += [(f"{opening}{question} <assistant>", False), (f"{reply} <eos>", True)]
    return parts


def interviews(seed: str, words: Words, size: int, turns: int, weights: dict[str, float]) -> Iterator[Batch]:
    """Batches of ``size`` pictures with ``turns`` questions each; ``weights`` over the kinds and ``caption``."""
    rng = random.Random(seed)
    names = (*KINDS, "caption")
    shares = [weights.get(name, 0.0) for name in names]
    while True:
        scenes = [practice_scene(rng) for _ in range(size)]
        rows = [interview(rng, scene, TRAIN, rng.choices(names, shares, k=turns)) for scene in scenes]
        ids, labels = words.batch(rows)
        yield Batch(ids, labels, patches([paint(s, rng.getrandbits(32)) for s in scenes]), tuple(scenes))


def cell_words(scenes: Sequence[Scene], words: Words, vocabulary: int) -> Tensor:
    """What each visual token should say: an even mix of its cell's name (twice) and its object's attributes. (B, 9, V)"""
    target = torch.zeros(len(scenes), len(CELLS), vocabulary)
    for b, scene in enumerate(scenes):
        for c, cell in enumerate(CELLS):
            thing = scene.get(cell)
            said = [language.NOTHING] if thing is None else [thing.size, thing.fill, thing.colour, thing.shape]
            for word in (cell, cell, *said):
                target[b, c, words.table[word]] += 1 / (2 + len(said))
    return target


def caption_drill(rng: random.Random, scene: Scene) -> list[Part]:
    """Cells in random order, each followed by what stands there: teaches reading a named cell."""
    parts: list[Part] = []
    for cell in rng.sample(CELLS, len(CELLS)):
        if cell in scene:
            thing = scene[cell]
            parts += [(f"{cell} is", False), (f"{thing.size} {thing.fill} {thing.colour} {thing.shape}", True)]
        elif rng.random() < 0.3:
            parts += [(f"{cell} is", False), (language.NOTHING, True)]
    return parts


def locate_drill(rng: random.Random, scene: Scene, turns: int = 14) -> list[Part]:
    """References to single objects, each followed by its cell: teaches finding a place by content."""
    parts: list[Part] = []
    for _ in range(turns):
        thing = rng.choice(tuple(scene.values()))
        names = rng.choice((("colour",), ("shape",), ("colour", "shape"), ("colour", "shape")))
        wish = {name: getattr(thing, name) for name in names}
        cells = cells_of(scene, wish)
        if len(cells) == 1:
            parts += [(" ".join(wish.values()) + " at", False), (cells[0], True)]
    return parts


def count_drill(rng: random.Random, scene: Scene, turns: int = 14) -> list[Part]:
    """Colours and shapes, each followed by how many there are."""
    parts: list[Part] = []
    for _ in range(turns):
        kind = rng.choice(("colour", "shape"))
        value = getattr(rng.choice(tuple(scene.values())), kind) if rng.random() < 0.75 else rng.choice(ATTRIBUTES[kind])
        parts += [(f"{value} number", False), (str(len(cells_of(scene, {kind: value}))), True)]
    return parts


def exists_drill(rng: random.Random, scene: Scene, turns: int = 12) -> list[Part]:
    """Pairs of colour and shape, each followed by yes or no."""
    found = [ask_exists(rng, scene, TRAIN) for _ in range(turns)]
    cut = ("is there a ", " ?")
    return [p for one in found if one for p in ((_strip(one.question, *cut) + " there", False), (one.reply, True))]


def value_drill(rng: random.Random, scene: Scene, turns: int = 14) -> list[Part]:
    """References and an attribute, each followed by its value."""
    found = [ask_value(rng, scene, TRAIN) for _ in range(turns)]
    cut = ("what ", " is the", " object", " ?")
    return [p for one in found if one for p in ((_strip(one.question, *cut), False), (one.reply, True))]


def _strip(text: str, *pieces: str) -> str:
    for piece in pieces:
        text = text.replace(piece, "")
    return text


Drill = Callable[[random.Random, Scene], list[Part]]
CAPTIONS: tuple[Drill, ...] = (caption_drill,)
LOCATIONS: tuple[Drill, ...] = (caption_drill, locate_drill, locate_drill)
ALL_DRILLS: tuple[Drill, ...] = (
    caption_drill,
    *(locate_drill,) * 2,
    *(count_drill,) * 3,
    *(exists_drill,) * 2,
    *(value_drill,) * 2,
)


def drills(seed: str, words: Words, size: int, kinds: Sequence[Drill]) -> Iterator[Batch]:
    """Batches of dense practice: few words and many answers per picture."""
    rng = random.Random(seed)
    while True:
        scenes = tuple(practice_scene(rng) for _ in range(size))
        opening: Part = (f"<bos> <user> {picture_words()}", False)
        ids, labels = words.batch([[opening, *rng.choice(kinds)(rng, scene)] for scene in scenes])
        yield Batch(ids, labels, patches([paint(s, rng.getrandbits(32)) for s in scenes]), scenes)


def pictures(seed: str, size: int) -> Iterator[tuple[Tensor, tuple[Scene, ...]]]:
    """Batches of pictures alone."""
    rng = random.Random(seed)
    while True:
        scenes = tuple(practice_scene(rng) for _ in range(size))
        yield patches([paint(s, rng.getrandbits(32)) for s in scenes]), scenes
