"""What does reinforcing a role of P parameters take? The sum of ``docs/reinforcement.md`` beside the peak of a real run.

    python bench/memory.py [--layers 12] [--iterations 3] [--json bench/results/memory.json]

A Qwen3 of random weights, 1,024 wide, plays and learns for some iterations on a CPU, each arm in a process of its own; from its peak
that of the same run with a model of next to no parameters is taken. A peak is told twice: of anonymous memory (RssAnon, looked at every
10 ms), and of all (VmHWM), weights' files that are mapped to be read counted too, which the system drops where it is short. Told beside it,
in multiples of P parameters at b bytes:

    full          weights, gradient, two moments of AdamW, the playing copy, the start's copy    6
    no reference  the same without the start's copy                                              5
    bfloat16      ``full`` at two bytes                                                          6
    lora          weights, the playing copy, the start's copy; an adapter of rank 8              3
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from monologue.rollouts import reinforce
from monologue.tasks.shapes import Shapes
from monologue.training.reinforcement import Reinforcement
from monologue.training.starter.models import CONTEXT, build_tokenizer

WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (6, {}),
    "no reference": (5, {"reference": False}),
    "bfloat16": (6, {"dtype": "bfloat16", "tolerance": 0.5}),
    "lora": (3, {"lora": {"rank": 8}}),
}


def build(folder: Path, layers: int, wide: bool, dtype: torch.dtype) -> int:
    """A checkpoint; its number of parameters."""
    tokenizer = build_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {**(WIDE if wide else NARROW), "num_hidden_layers": layers, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**size, **special, tie_word_embeddings=True)).to(dtype)
    for thing in (model, tokenizer):
        thing.save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


def status(name: str) -> str:
    """Of this process, in KiB."""
    return next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))


class Peak(threading.Thread):
    """The most anonymous memory of this process while the block runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._done = 0.0, threading.Event()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, 1024 * float(status("RssAnon")))


def life(folder: Path, arm: str, iterations: int) -> tuple[float, float]:
    """Peaks of this process in bytes after a run: of anonymous memory, of all."""
    facts = {"questioner": str(folder / "model"), "graph": "blind", "problems": 2, "samples": 4, "max_tokens": 8, "max_turns": 1}
    facts |= {"iterations": iterations, "truncated": True, "lr": 1e-6, "save_every": iterations, "guards": {"entropy": None, "drift": None}}
    with Peak() as peak:
        reinforce(Reinforcement.read({**facts, **ARMS[arm][1]}), folder / "run", Shapes())
    return peak.bytes, 1024 * float(status("VmHWM"))


def measure(arm: str, layers: int, iterations: int) -> dict[str, Any]:
    times, change = ARMS[arm]
    dtype = getattr(torch, change.get("dtype", "float32"))
    found: list[list[float]] = []
    for wide in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            parameters = build(Path(folder) / "model", layers, wide, dtype)
            command = [sys.executable, __file__, "--life", folder, "--arm", arm, "--iterations", str(iterations)]
            found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]))
    small, large = found
    copies = [round((peak - least) / (parameters * dtype.itemsize), 2) for least, peak in zip(small, large, strict=True)]
    facts = {"parameters": parameters, "bytes": dtype.itemsize, "small_gb": [round(one / 1e9, 3) for one in small]}
    return {"arm": arm, **facts, "peak_gb": [round(one / 1e9, 3) for one in large], "copies": copies, "told": times}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--iterations", type=int, default=3)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options.add_argument("--life", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--arm", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.life:
        print(json.dumps(life(chosen.life, chosen.arm, chosen.iterations)))
        return
    rows = []
    for arm in chosen.arms:
        rows.append(measure(arm, chosen.layers, chosen.iterations))
        print(json.dumps(rows[-1]))
    command = f"python bench/memory.py --layers {chosen.layers} --iterations {chosen.iterations}"
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    chosen.json.write_text(json.dumps({"name": "memory", "command": command, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
