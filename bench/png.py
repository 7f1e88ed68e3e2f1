"""Storing a picture beside Pillow's own writer, at the level that was used before: processor seconds and bytes.

    python bench/png.py [--repeats 7] [--json bench/results/png.json]

Pictures of both worlds, a photograph-like field of blurred noise with and without grain, a screen (``docs/page-light.png``) and a plain
ground; writers take turns. Ratios are Pillow's over ours, within a repeat: median, least, most. It can lose, and does on bytes where pieces
repeat.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, ImageChops, ImageFilter
from rollout import spread

from monologue.tasks.hops import Hops
from monologue.tasks.shapes import Shapes
from monologue.traces.png import png_bytes

HERE = Path(__file__).parent


def pillow(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def pictures() -> dict[str, list[Image.Image]]:
    """By kind; many of the small ones, so that a measurement takes long enough."""
    noise = Image.merge("RGB", [Image.effect_noise((1024, 768), 40) for _ in range(3)])
    photograph = noise.filter(ImageFilter.GaussianBlur(3))
    return {
        "shapes, 84 x 84": [problem.pictures[0]() for problem in Shapes().problems("test", 100)],
        "hops, 112 x 84": [problem.pictures[0]() for problem in Hops().problems("test", 100)],
        "smooth field, 1024 x 768": [photograph],
        "the same with grain": [ImageChops.add(photograph, noise.point(lambda value: value // 16))],
        "screen, 1440 x 1080": [Image.open(HERE.parent / "docs" / "page-light.png").convert("RGB")],
        "plain, 640 x 480": [Image.new("RGB", (640, 480), "white")],
    }


def taken(write: Callable[[Image.Image], bytes], some: list[Image.Image]) -> tuple[float, int]:
    """Processor seconds and bytes."""
    started = time.process_time()
    sizes = [len(write(image)) for image in some]
    return time.process_time() - started, sum(sizes)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--json", type=Path, default=HERE / "results" / "png.json")
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    ratio: dict[str, Any] = {}
    for kind, some in pictures().items():
        pairs = []
        for _ in range(chosen.repeats):
            (theirs, theirs_bytes), (ours, ours_bytes) = taken(pillow, some), taken(png_bytes, some)
            pairs.append(theirs / ours)
            rows.append({"pictures": kind, "milliseconds": 1e3 * ours / len(some), "pillow_milliseconds": 1e3 * theirs / len(some)})
        sizes = {"bytes": ours_bytes // len(some), "pillow_bytes": theirs_bytes // len(some)}
        ratio[kind] = {"seconds": spread(pairs), "bytes": round(theirs_bytes / ours_bytes, 2), **sizes}
        print(kind, json.dumps(ratio[kind]))
    machine = f"{platform.machine()}, Python {platform.python_version()}, Pillow {PIL.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    result = {"name": "png", "command": f"python bench/png.py --repeats {chosen.repeats}", "machine": machine, "rows": rows, "ratio": ratio}
    chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
