"""Stored pictures: any reader gives back the very pixels, from files that differ in nothing where the pixels do not."""

import io
import random
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from monologue.tasks.hops import Hops
from monologue.tasks.shapes import Shapes
from monologue.traces.images import open_picture
from monologue.traces.png import png_bytes

SIZES = [(1, 1), (1, 7), (7, 1), (84, 84), (112, 84), (257, 3), (640, 480)]


def grain(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(f"{width}/{height}").randbytes(3 * width * height))


@pytest.mark.parametrize("size", SIZES)
def test_a_reader_gives_back_the_very_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    for image in (grain(*size), Image.new("RGB", size, "teal"), Image.linear_gradient("L").resize(size).convert("RGB")):
        data = png_bytes(image)
        with Image.open(io.BytesIO(data)) as read:
            assert (read.format, read.mode, read.size) == ("PNG", "RGB", size)
            read.verify()  # every chunk's checksum
        (tmp_path / "picture.png").write_bytes(data)
        assert open_picture(tmp_path / "picture.png").tobytes() == image.tobytes()
        assert png_bytes(image.copy()) == data


def test_other_pixels_are_another_file_and_other_modes_are_stored_as_they_look() -> None:
    image = grain(9, 5)
    other = image.copy()
    other.putpixel((8, 4), tuple(255 - value for value in other.getpixel((8, 4))))  # type: ignore[union-attr]
    assert png_bytes(image) != png_bytes(other)
    grey = ImageOps.grayscale(image)
    assert png_bytes(grey) == png_bytes(grey.convert("RGB"))


def test_pictures_of_the_worlds_take_hardly_more_bytes_than_with_pillow() -> None:
    for task in (Shapes(), Hops()):
        ours, theirs = 0, io.BytesIO()
        for problem in task.problems("train", 20):
            image = problem.pictures[0]()
            ours += len(png_bytes(image))
            image.save(theirs, "PNG", compress_level=1)
        assert ours <= 1.05 * len(theirs.getvalue())


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        png_bytes(Image.new("RGB", (0, 5)))
