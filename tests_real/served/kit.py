"""What the tests of this folder share."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monologue.backends.base import Sampling
from monologue.backends.serving.launch import Server
from monologue.backends.sglang import SGLangBackend
from monologue.seating import starter

EOS = 2
GREEDY = Sampling(temperature=0.0, max_tokens=16, stop_ids=(EOS,))
ALL = Sampling(temperature=1.0, max_tokens=400)
"""Never stops before its length."""

Start = Callable[..., Server]
Connect = Callable[..., SGLangBackend]


def post(url: str, path: str, body: dict[str, Any], timeout: float = 60.0) -> Any:
    """What a server answers to somebody who does not use our client."""
    data = json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url + path, data, {"content-type": "application/json"}), timeout=timeout
    ) as answer:
        return json.load(answer)


def running(url: str) -> int:
    """Requests that a server is working on."""
    with urllib.request.urlopen(f"{url}/v1/loads", timeout=5) as answer:
        return sum(int(one["num_running_reqs"]) for one in json.load(answer)["loads"])


def scaled(folder: Path, factor: float) -> Path:
    """The starter questioner with every weight multiplied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(starter("questioner"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * factor for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
