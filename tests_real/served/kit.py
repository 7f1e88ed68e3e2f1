"""What the tests of this folder share."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monologue.backends.base import Sampling
from monologue.backends.serving.launch import Server
from monologue.backends.sglang import SGLangBackend
from monologue.seating import starter

PYTHON = Path(__file__).parent.parent.parent / ".venv-sglang" / "bin" / "python"
"""Where SGLang is installed."""
EOS = 2
GREEDY = Sampling(temperature=0.0, max_tokens=16, stop_ids=(EOS,))
ALL = Sampling(temperature=1.0, max_tokens=400)
"""Never stops before its length."""
CLOSE = 1e-3
"""Nats between two engines in float32 where a state is fed back, which magnifies: float32 is up to 1.5e-4 from float64 within one process,
and two engines were once 2.8e-4 apart. A thought taken from the place before its own is 2 nats off at least (40 replies, 7 the median)."""

Start = Callable[..., Server]
Connect = Callable[..., SGLangBackend]


def post(url: str, path: str, body: dict[str, Any], timeout: float = 60.0) -> Any:
    """What a server answers to somebody who does not use our client."""
    data = json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, {"content-type": "application/json"}), timeout=timeout) as answer:
        return json.load(answer)


def running(url: str) -> int:
    """Requests that a server is working on."""
    with urllib.request.urlopen(f"{url}/v1/loads", timeout=5) as answer:
        return sum(int(one["num_running_reqs"]) for one in json.load(answer)["loads"])


def flush(url: str, seconds: float = 30.0) -> None:
    """Empties a server's cache as soon as it has nothing to do."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/flush_cache", b"", method="POST"), timeout=60):
                return
        except urllib.error.HTTPError:  # it is not idle yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def scaled(folder: Path, factor: float, role: str = "questioner") -> Path:
    """A starter policy with every weight multiplied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(starter(role), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * factor for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapter(folder: Path, merged: Path, seed: int) -> tuple[Path, Path]:
    """A LoRA adapter of rank 4 for the starter questioner in PEFT's layout, and the same model with the adapter merged."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    shutil.copytree(starter("questioner"), merged)
    folder.mkdir()
    weights, found, modules = load_file(merged / "model.safetensors"), dict[str, Any](), ("q_proj", "v_proj", "down_proj")
    for name in [name for name in weights if name.split(".")[-2] in modules]:
        high, wide = weights[name].shape
        down, up = torch.randn(4, wide) * 0.05, torch.randn(high, 4) * 0.05
        key = "base_model.model." + name.removesuffix("weight")
        found |= {f"{key}lora_A.weight": down, f"{key}lora_B.weight": up}
        weights[name] = weights[name].float() + 2.0 * up @ down
    save_file(found, folder / "adapter_model.safetensors")
    save_file({name: value.float() for name, value in weights.items()}, merged / "model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(starter("questioner"))}))
    return folder, merged
