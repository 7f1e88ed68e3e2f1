"""What the server itself does with what our client refuses: the reason for each refusal, on a server of its own, which does not survive.

A failure here means that SGLang has changed its ways, and that a refusal may be dropped.
"""

from __future__ import annotations

import base64
import urllib.error
from typing import Any

import pytest
from PIL import Image

from monologue.traces.png import png_bytes
from tests_real.served.kit import Start, post

PAD, OPEN, CLOSE = 13, 11, 12


def asked(ids: list[int], pictures: int) -> dict[str, Any]:
    images = [base64.b64encode(png_bytes(Image.new("RGB", (84, 84), "red"))).decode()] * pictures
    return {"input_ids": ids, "image_data": images or None, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}


def test_what_the_refused_requests_do_to_a_server(start: Start) -> None:
    server = start("answerer")
    framed = [20, OPEN, PAD, CLOSE, 21]
    assert post(server.url, "/generate", asked(framed, 1))["meta_info"]["prompt_tokens"] == len(framed) + 8

    dropped = post(server.url, "/generate", asked(framed, 2))["meta_info"]
    assert dropped["prompt_tokens"] == len(framed) + 8, "a picture too many was not dropped in silence"
    unframed = post(server.url, "/generate", asked([20, PAD, 21], 1))["meta_info"]
    assert unframed["prompt_tokens"] == 3, "a picture without its frame was not dropped in silence"
    assert post(server.url, "/generate", asked(framed, 0))["meta_info"]["prompt_tokens"] == len(framed), "a lone placeholder is no token"

    with pytest.raises((TimeoutError, urllib.error.HTTPError)):  # never answered, or refused
        post(server.url, "/generate", asked([20, OPEN, *[PAD] * 9, CLOSE, 21], 1), timeout=4.0)
    assert server.alive()

    with pytest.raises((urllib.error.URLError, OSError)):
        post(server.url, "/generate", asked([20, 10**6], 0), timeout=30.0)
    server.process.wait(60)
    assert not server.alive(), "the server outlived an id outside its vocabulary"
