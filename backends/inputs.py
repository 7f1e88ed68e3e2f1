"""What a checkpoint is fed, the same for whoever feeds it: pixels and grids of pictures, room in the prompt, position ids, banned ids.

The engine that samples and the trainer that learns from the samples both ask here. Two implementations of this page are how projects came
to train on something that no policy ever saw: positions without the pictures' grid, pictures resized by another library, a placeholder id
with probability where the sampler had banned it.

Shapes: L ids, P position axes (1, or 3 for M-RoPE), N patches of all pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL.Image import Image, new
from torch import Tensor

from monologue.backends.base import RequestRefused
from monologue.backends.checkpoints import Checkpoint, processor_hash
from monologue.backends.pictures import Placeholders


class Eyes:
    """What a model's configuration and image processor say about pictures; needs no weights, so clients of servers have it too."""

    def __init__(self, config: Any, processor: Any | None, source: str) -> None:
        self._processor, self._source = processor, source
        video = getattr(config, "video_token_id", None)
        self.sees = processor is not None
        """Takes pictures."""
        self.processor_hash = processor_hash(processor)
        self.image_token_id: int | None = getattr(config, "image_token_id", None) if self.sees else None
        self.banned: tuple[int, ...] = tuple(sorted({i for i in (self.image_token_id, video) if self.sees and i is not None}))
        """Ids that are never sampled: a placeholder without its picture breaks the next prompt."""
        self._rooms: dict[tuple[int, int], Placeholders] = {}

    def placeholders(self, image: Image) -> Placeholders:
        """The room a picture takes in a prompt; it depends on the picture's size alone. Raises RequestRefused."""
        if self._processor is None:
            raise RequestRefused(f"expected no picture: {self._source!r} is a text-only model")
        if image.size not in self._rooms:
            try:
                _, grids = self.pixels([new("RGB", image.size)])
            except ValueError as error:
                raise RequestRefused(f"expected a picture that the model's processor takes, got {image.size!r} pixels: {error}") from error
            frames, high, wide = (int(side) for side in grids[0])
            merge = int(self._processor.merge_size)
            self._rooms[image.size] = Placeholders((frames, high, wide), frames * high * wide // merge**2)
        return self._rooms[image.size]

    def fitted(self, image: Image) -> Image:
        """The picture as the processor resizes it, ready to be cut into patches."""
        assert self._processor is not None
        _, high, wide = self.placeholders(image).grid
        patch = int(self._processor.patch_size)
        return image.convert("RGB").resize((wide * patch, high * patch), self._processor.resample)

    def pixels(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Patches of all pictures, one after another (N, values), and their grids (pictures, 3)."""
        assert self._processor is not None
        found = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return found["pixel_values"], found["image_grid_thw"]


class Inputs(Eyes):
    """Prepares ids and pictures for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.model.config, checkpoint.image_processor, checkpoint.source)
        self._model = checkpoint.model
        self._rope = lru_cache(maxsize=1024)(self._rope_of)
        self.vocabulary = int(self._model.get_input_embeddings().num_embeddings)

    def positions(self, ids: Sequence[int], grids: Tensor | None) -> Tensor:
        """(1, L) for text models; (3, L) for M-RoPE, from the model itself where there are pictures."""
        plain = torch.arange(len(ids)).unsqueeze(0)
        if self._processor is None:
            return plain
        if grids is None:
            return plain.expand(3, -1)
        places = tuple(place for place, token in enumerate(ids) if token == self.image_token_id)
        return self._rope(len(ids), places, tuple(map(tuple, grids.tolist())))

    def _rope_of(self, length: int, places: tuple[int, ...], grids: tuple[tuple[int, ...], ...]) -> Tensor:
        return rope(self._model, length, places, grids)


def rope(model: Any, length: int, places: Sequence[int], grids: Sequence[Sequence[int]]) -> Tensor:
    """(3, L), the model's own answer; it depends on where placeholders stand (``places``) and on nothing else of the ids."""
    kinds = torch.zeros(1, length, dtype=torch.int)
    kinds[0, list(places)] = 1
    image, video = model.config.image_token_id, getattr(model.config, "video_token_id", None)
    word = next(token for token in range(3) if token not in (image, video))
    tokens = torch.where(kinds.bool(), image, word)
    positions: Tensor = model.model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=torch.tensor(grids))[0]
    return positions[:, 0]
