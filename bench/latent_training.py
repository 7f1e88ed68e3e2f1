"""What a training step through latent steps costs: full gradients, detached states, and the ways that read everything again.

    MONOLOGUE_IVTLR=CHECKOUT python bench/latent_training.py [--repeats 3] [--json bench/results/latent_training.json]

Forward and backward of the loss on 7 words after n = 3 latent steps of K = 32 patches, in the setting of ``bench/latent.py`` (8 layers,
width 512, 200 prompt ids of which 100 are visual, float32), decoder trained, tower and embeddings frozen, one question a step:

    full            the engine: every position once, gradients through the states
    detached        the same, states detached: what an anchor loss is used with
    full, anew      gradients through the states without a cache, as Coconut has it: n + 1 forward passes, all with their graph
    released        the released IVT-LR code, detached: n + 1 forward passes

Figures: median, least and most of wall and processor seconds, token-positions of the forward, peak memory above the loaded model (a forked
process each). What each way learns is another matter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from latent import CONFIGURATIONS, STEPS, K, ask, peak, positions, spread, timed
from released_ivtlr import HOW, LATENT, checkout, model, released

from monologue.backends.perception.ivtlr import OURS, Asked, LatentReasoner, prompts

SAID = [20, 31, 42, 53, 64, 75, 1]
ARMS = ("full", "detached", "full, anew", "released")
LAYERS, WIDTH, VOCABULARY = CONFIGURATIONS["8x512"]


def training(base: Any, arm: str) -> Callable[[int], None]:
    """One step of the engine."""
    mode = replace(OURS, order="state-first", k=K, gradients="detached" if arm == "detached" else "full")

    def step(seed: int) -> None:
        base.set_attn_implementation("sdpa")
        base.zero_grad()
        reasoner, said = LatentReasoner(base, mode), torch.tensor([SAID])
        given = prompts(base, [Asked(*ask(seed, VOCABULARY, "cpu"))])
        logits = reasoner.read(reasoner.think(given, STEPS, cached=arm != "full, anew"), said)
        torch.nn.functional.cross_entropy(logits[0], said[0]).backward()

    return step


def releasing(base: Any, place: Path) -> Callable[[int], None]:
    """One step of the released code."""
    code = released(base, K, place)

    def step(seed: int) -> None:
        base.set_attn_implementation("eager")
        base.zero_grad()
        ids, pixels, grids = ask(seed, VOCABULARY, "cpu")
        fed = torch.tensor([[*ids, *[LATENT] * STEPS, *SAID]])
        labels = torch.tensor([[*[-100] * (len(ids) + STEPS), *SAID]])
        places = torch.arange(fed.shape[1])[None]
        code.forward(fed, torch.ones_like(fed), labels, places, pixels, grids).loss.backward()

    return step


def measure(repeats: int, place: Path) -> list[dict[str, Any]]:
    base = model(LAYERS, WIDTH, VOCABULARY, dtype=torch.float32)
    base.model.language_model.layers.requires_grad_(True)
    ways = {arm: releasing(base, place) if arm == "released" else training(base, arm) for arm in ARMS}
    peaks = {arm: [peak(step, "cpu") for _ in range(2)] for arm, step in ways.items()}
    counted = {arm: positions(base, step) for arm, step in ways.items()}
    spent: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats):
        for arm, step in ways.items():
            spent[arm].append(timed(step, 100 * repeat, VOCABULARY, "cpu"))
    rows = []
    for arm in ARMS:
        wall, own = (spread([pair[side] for pair in spent[arm]]) for side in (0, 1))
        facts = {"arm": arm, "token_positions": counted[arm], "seconds": wall, "processor_seconds": own}
        rows.append({**facts, "peak_mib": spread(peaks[arm])})
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "latent_training.json")
    chosen = options.parse_args()
    place = checkout()
    if place is None:
        options.error(HOW)
    torch.set_num_threads(1)
    rows = measure(chosen.repeats, place)
    full = rows[0]
    ratio = {}
    for row in rows:
        figures = "  ".join(f"{name} {row[name]['median']:.4g}" for name in ("seconds", "processor_seconds", "peak_mib"))
        print(f"{row['arm']:12} token-positions {row['token_positions']:5}  {figures}")
        for name in ("seconds", "processor_seconds", "peak_mib"):
            ratio[f"{row['arm']}: {name}"] = round(row[name]["median"] / full[name]["median"], 2)
    print(ratio)
    where = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread"
    machine = f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, float32"
    facts = {"name": "latent_training", "command": f"python bench/latent_training.py --repeats {chosen.repeats}", "machine": machine}
    chosen.json.write_text(json.dumps({**facts, "rows": rows, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
