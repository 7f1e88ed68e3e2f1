"""Latent steps beside the released IVT-LR code, in one run: decoder token-positions, seconds a question, questions a second, peak memory.

    MONOLOGUE_IVTLR=CHECKOUT python bench/latent.py [--repeats 5] [--device cpu] [--dtype bfloat16] [--json FILE]

Both answer the same random questions about random pictures (100 visual tokens, n = 3 latent steps of K = 32 patches, 7 words) with the same
random weights, in float32 or in bfloat16 (in which the released script opens its model): the released code from the user's checkout, one
question at a time as it asserts, with the eager attention that it needs; the engine one at a time and 32 at a time, in ``reference`` mode
(the same work) and in ``ours``. ``products`` is no engine: the decoder's weights are multiplied with as many rows as the batched engine
reads, and nothing else is done, so on a machine that computes all the time the engine cannot be faster than this. Arms take turns within
a repeat.
Figures a question: median, least and most over repeats of wall and processor seconds; token-positions as layer 0 sees them; peak memory of
a call is how far the resident set grew, each arm in a process of its own (on a GPU: what was allocated). It can lose: what a batch wins
depends on how idle one question leaves the machine.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from released_ivtlr import HOW, LATENT, checkout, model, prompt, released, silent

from monologue.backends.patches import multiply_patches
from monologue.backends.perception.ivtlr import OURS, REFERENCE, Asked, LatentReasoner, Mode, prompts

CONFIGURATIONS = {"8x512": (8, 512, 8000), "4x64": (4, 64, 512)}
"""Layers, width, vocabulary."""
GRID, STEPS, K, WORDS, SPOKEN, BATCH = 10, 3, 32, 98, 7, 32
STATE_FIRST = replace(OURS, order="state-first")
"""The order in which all of these were measured; it changes neither counts nor work."""
ARMS = {
    "released": (None, 1),
    "reference": (REFERENCE, 1),
    "ours": (STATE_FIRST, 1),
    "reference batched": (REFERENCE, BATCH),
    "ours batched": (STATE_FIRST, BATCH),
    "products": (None, BATCH),
}
TARGETS = {"token_positions": 4.0, "seconds": 3.0, "throughput": 15.0}


@functools.cache
def ask(seed: int, vocabulary: int, device: str, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
    ids, pixels, grids = prompt(WORDS, GRID, seed, vocabulary, dtype)
    return ids, pixels.to(device), grids.to(device)


def releasing(base: Any, place: Path, vocabulary: int, device: str) -> Callable[[int], None]:
    """The released code's way to answer one question."""
    base.set_attn_implementation("eager")
    code = released(base, K, place)
    code.eos_token_id = -1  # as many words as the others

    def answer(seed: int) -> None:
        ids, pixels, grids = ask(seed, vocabulary, device, base.dtype)
        fed = torch.tensor([[*ids, *[LATENT] * STEPS]], device=device)
        with silent():
            code.generate(fed, torch.ones_like(fed), pixels, grids, max_new_tokens=SPOKEN)

    return answer


def reasoning(base: Any, mode: Mode, batch: int, vocabulary: int, device: str) -> Callable[[int], None]:
    """The engine's way to answer ``batch`` questions."""
    base.set_attn_implementation("sdpa")
    reasoner = LatentReasoner(base, replace(mode, k=K))

    def answer(seed: int) -> None:
        asked = [Asked(*ask(seed + lane, vocabulary, device, base.dtype)) for lane in range(batch)]
        thoughts = reasoner.think(prompts(base, asked), STEPS)
        logits = reasoner.say(thoughts.last)
        for _ in range(SPOKEN - 1):
            logits = reasoner.hear(thoughts, logits.argmax(-1))

    return answer


def multiplying(base: Any, batch: int, device: str) -> Callable[[int], None]:
    """Only the matrix products of ``batch`` answers."""
    decoder, head = base.model.language_model, base.lm_head.weight
    *before, last = decoder.layers
    weights = [one.weight for layer in (*before, last.self_attn) for one in layer.modules() if isinstance(one, torch.nn.Linear)]
    ending = [one.weight for one in last.mlp.modules() if isinstance(one, torch.nn.Linear)]  # of a block only the last place is read on
    blocks = [WORDS + GRID**2 + 2, *[K + 1] * STEPS, *[1] * (SPOKEN - 1)]  # places a lane, read one block after another
    wides, kind = {w.shape[1] for w in (*weights, *ending)}, {"device": device, "dtype": base.dtype}
    given = {(rows, wide): torch.ones(batch * rows, wide, **kind) for rows in {*blocks, 1} for wide in wides}

    def answer(seed: int) -> None:
        for places in blocks:
            for weight in weights:
                torch.nn.functional.linear(given[places, weight.shape[1]], weight)
            for weight in ending:
                torch.nn.functional.linear(given[1, weight.shape[1]], weight)
        for _ in range(SPOKEN):
            torch.nn.functional.linear(given[1, head.shape[1]], head)

    answer.positions = batch * sum(blocks)  # type: ignore[attr-defined]

    return answer


def way(arm: str, base: Any, place: Path, vocabulary: int, device: str) -> Callable[[int], None]:
    mode, batch = ARMS[arm]
    if arm == "products":
        return multiplying(base, batch, device)
    return releasing(base, place, vocabulary, device) if mode is None else reasoning(base, mode, batch, vocabulary, device)


def positions(base: Any, answer: Callable[[int], None]) -> int:
    """Token-positions that layer 0 is given for one call."""
    seen: list[int] = []
    layer = base.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, given, more: seen.append((more.get("hidden_states", given[0])).shape[:2].numel()), with_kwargs=True
    )
    answer(0)
    hook.remove()
    return sum(seen)


def timed(answer: Callable[[int], None], seed: int, vocabulary: int, device: str, dtype: torch.dtype) -> tuple[float, float]:
    for lane in range(BATCH):  # made before the clock starts
        ask(seed + lane, vocabulary, device, dtype)
    wall, own = time.perf_counter(), time.process_time()
    answer(seed)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - own


def peak(answer: Callable[[int], None], device: str) -> float:
    """MiB that one call needs above the loaded model; on a CPU in a forked process, whose heap no other arm has stretched."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answer(0)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    given, taken = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_grown, args=(taken, answer))
    child.start()
    found: float = given.recv()
    child.join()
    return found


def _grown(told: Any, answer: Callable[[int], None]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident set so far
    before = resident("VmRSS")
    answer(0)
    told.send((resident("VmHWM") - before) / 2**10)


def resident(name: str) -> int:
    """KiB, as Linux tells."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


@torch.no_grad()
def measure(configuration: str, repeats: int, device: str, dtype: torch.dtype, place: Path) -> list[dict[str, Any]]:
    layers, width, vocabulary = CONFIGURATIONS[configuration]
    theirs = model(layers, width, vocabulary, dtype=dtype).to(device)
    mine = multiply_patches(copy.deepcopy(theirs))  # as ``open_checkpoint`` leaves it
    bases = {arm: theirs if arm == "released" else mine for arm in ARMS}
    peaks = {arm: [peak(way(arm, base, place, vocabulary, device), device) for _ in range(2)] for arm, base in bases.items()}
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    counted: dict[str, int] = {}
    for repeat in range(-1, repeats):
        for arm, base in bases.items():
            answer = way(arm, base, place, vocabulary, device)
            if repeat < 0:  # also warms up
                counted[arm] = answer.positions if arm == "products" else positions(base, answer)  # type: ignore[attr-defined]
            else:
                seconds[arm].append(timed(answer, 100 * repeat, vocabulary, device, dtype))
    rows = []
    for arm, (_, batch) in ARMS.items():
        wall, own = ([pair[side] / batch for pair in seconds[arm]] for side in (0, 1))
        facts = {"configuration": configuration, "arm": arm, "batch": batch, "token_positions": counted[arm] / batch}
        rows.append({**facts, "seconds": spread(wall), "processor_seconds": spread(own), "peak_mib": spread(peaks[arm])})
    return rows


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times less than the released code."""
    found = {(row["configuration"], row["arm"]): row for row in rows}
    ratio = {}
    for (configuration, arm), row in found.items():
        theirs = found[configuration, "released"]
        if arm != "released":
            name = f"{configuration}, {arm}"
            ratio[f"{name}: token-positions"] = theirs["token_positions"] / row["token_positions"]
            for kind in ("seconds", "processor_seconds", "peak_mib"):
                ratio[f"{name}: {kind}"] = theirs[kind]["median"] / row[kind]["median"]
    return {name: round(value, 2) for name, value in ratio.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--configuration", choices=CONFIGURATIONS, action="append")
    options.add_argument("--json", type=Path, help="default: bench/results/latent.json, latent-bfloat16.json")
    chosen = options.parse_args()
    place = checkout()
    if place is None:
        options.error(HOW)
    dtype = getattr(torch, chosen.dtype)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows = [row for name in chosen.configuration or CONFIGURATIONS for row in measure(name, chosen.repeats, chosen.device, dtype, place)]
    for row in rows:
        figures = "  ".join(f"{name} {row[name]['median']:.4g}" for name in ("seconds", "processor_seconds", "peak_mib"))
        print(f"{row['configuration']:6} {row['arm']:18} token-positions {row['token_positions']:6.0f}  {figures}")
    ratio = ratios(rows)
    print("\n".join(f"{value:6.2f}x less  {name}" for name, value in ratio.items()))
    where = torch.cuda.get_device_name() if chosen.device != "cpu" else f"{platform.machine()}, {os.cpu_count()} cores, 1 thread"
    machine = f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, {chosen.dtype}"
    command = f"python bench/latent.py --repeats {chosen.repeats} --device {chosen.device} --dtype {chosen.dtype}"
    command += "".join(f" --configuration {one}" for one in chosen.configuration or ())
    name = "latent" if chosen.dtype == "float32" else f"latent-{chosen.dtype}"
    facts = {"name": name, "command": command, "machine": machine, "targets": TARGETS, "rows": rows, "ratio": ratio}
    (chosen.json or Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
