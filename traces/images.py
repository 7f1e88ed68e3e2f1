"""Pictures by content: opened within limits, kept once as PNG under their SHA-256, never inline in a span.

Opening is where strangers' files come in, so everything is bounded before a pixel is decoded: kind of file, size on disk, format, number of
pixels. Every refusal is one sentence that says what was expected and what came.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
LARGEST_FILE = 20 * 2**20
"""Bytes."""
MOST_PIXELS = 40_000_000
REFERENCE = re.compile(r"images/([0-9a-f]{64})\.png")
"""How a message names a stored picture."""


class PictureError(ValueError):
    """A picture that cannot or must not be opened."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and the hash of the PNG bytes that it is stored as."""

    sha256: str
    """Name of its file."""
    image: Image.Image
    """RGB."""


def open_picture(path: str | Path) -> Image.Image:
    """An RGB picture from a file. Raises PictureError for anything else."""
    path = Path(path)
    try:
        if not path.exists():
            raise PictureError(f"expected a picture file, but {str(path)!r} does not exist")
        return _opened(path)
    except OSError as error:
        raise PictureError(f"expected a picture file, but {str(path)[:200]!r} cannot be read: {error.strerror}") from error


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise PictureError(f"expected a picture file, but {str(path)!r} is a folder or device; name one picture")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise PictureError(
            f"expected a picture of at most {LARGEST_FILE >> 20} MB, but {str(path)!r} has {size / 2**20:.0f} MB; scale it down"
        )
    return decode(path.read_bytes(), repr(str(path)))


def decode(data: bytes, name: str) -> Image.Image:
    """An RGB picture from the bytes of a file; ``name`` is how errors call it. Raises PictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower than Pillow's
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    limit = MOST_PIXELS // 1_000_000
                    raise PictureError(
                        f"expected at most {limit} million pixels, but {name} has {image.width} x {image.height}; scale it down"
                    )
                image.load()
                return upright(image)
    except Image.DecompressionBombError as error:
        raise PictureError(f"expected at most {MOST_PIXELS // 1_000_000} million pixels, but {name} has far more; scale it down") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"expected a {', '.join(FORMATS)} picture, but {name} is none of these; convert it first") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"expected a whole picture, but {name} is truncated or damaged ({error}); save it anew") from error


def upright(image: Image.Image) -> Image.Image:
    """As a person sees it, in RGB: turned as its EXIF data say, transparency on white, sixteen bits scaled to eight."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        seen = image.convert("RGBA")
        ground = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(ground, seen).convert("RGB")
    return image.convert("RGB")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keep(folder: Path, data: bytes) -> str:
    """Writes PNG bytes under their hash, whole or not at all; a picture that is there already costs nothing. Raises OSError."""
    name = digest(data)
    target = folder / f"{name}.png"
    if not target.exists():
        handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(part, target)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    return name
