"""Where a prompt's pictures sit among its ids.

A picture takes part in a prompt as a run of one placeholder id, as long as the processor's grid says. Codecs expand the run
before the call (``engine.placeholders`` tells the length), engines check it here with the same few lines, and the trace keeps
the result, so that a trainer can rebuild the exact input. Wrong counts are refused rather than repaired: a picture that slid by
one patch would train a model on something that it never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image

from monologue.backends.base import ImageFacts, Prompt, RequestRefused


@dataclass(frozen=True, slots=True)
class Placeholders:
    """How much room a picture takes in a prompt."""

    grid: tuple[int, int, int]
    """Patches along time, height and width before merging."""
    count: int
    """Visual tokens, i.e. placeholder ids in the prompt."""


class Eyes(Protocol):
    """How an engine places pictures in a prompt; every engine that sees has these three."""

    @property
    def image_token_id(self) -> int | None: ...

    @property
    def processor_hash(self) -> str: ...

    def placeholders(self, image: Image) -> Placeholders: ...


def locate(prompt: Prompt, rooms: tuple[Placeholders, ...], placeholder_id: int | None, processor_hash: str) -> tuple[ImageFacts, ...]:
    """One ImageFacts per picture, in order; RequestRefused where ids and pictures do not fit together."""
    spots = [index for index, token in enumerate(prompt.ids) if token == placeholder_id]
    wanted = [room.count for room in rooms]
    if len(spots) != sum(wanted):
        raise RequestRefused(
            f"expected {sum(wanted)} image placeholders (id {placeholder_id!r}) for {len(wanted)} pictures ({wanted!r} each), "
            f"got {len(spots)} in the prompt; expand each picture's placeholders to the engine's count before the call"
        )
    facts, taken = [], 0
    for picture, room in zip(prompt.pictures, rooms, strict=True):
        run = spots[taken : taken + room.count]
        if run[-1] - run[0] != room.count - 1:
            raise RequestRefused(
                f"expected {room.count} adjacent image placeholders from index {run[0]}, got some up to index {run[-1]}; "
                "keep one picture's placeholders together"
            )
        if run[-1] + 1 in spots[taken + room.count : taken + room.count + 1]:
            raise RequestRefused(f"expected another token between two pictures' placeholders, got none at index {run[-1] + 1}")
        width, height = picture.image.size
        facts.append(ImageFacts(picture.sha256, width, height, room.grid, run[0], room.count, processor_hash))
        taken += room.count
    return tuple(facts)
