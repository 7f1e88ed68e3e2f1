"""Equal to the released IVT-LR code: chosen patches, latent states, next-token logits and greedy words, on the same random model.

    MONOLOGUE_IVTLR=CHECKOUT python bench/latent_reference.py [--inputs 20] [--json bench/results/latent_reference.json]

One random Qwen2-VL in float64 (4 layers, width 64, 100 visual tokens), random prompts and pictures, n latent steps in 0 .. 3 and K patches
in 1, 8, 32, each run by the released code from the user's checkout and by the engine in ``reference`` mode; float64, because random
weights answer to the last bit. Published: how many inputs agree in sets and words, and the largest differences.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from released_ivtlr import EOS, HOW, LATENT, checkout, model, prompt, released, silent

from monologue.backends.perception.ivtlr import REFERENCE, Asked, LatentReasoner, prompts

VOCABULARY, LAYERS, WIDTH, GRID, SAID = 512, 4, 64, 10, 8
TOLERANCE = 1e-9


@torch.no_grad()
def theirs(base: Any, place: Path, n: int, k: int, ids: tuple[int, ...], pixels: torch.Tensor, grids: torch.Tensor) -> dict[str, Any]:
    """What the released code does with one prompt; chosen patches are found again among the tower's rows."""
    code = released(base, k, place)
    fed = torch.tensor([[*ids, *[LATENT] * n]])
    given = {"input_ids": fed, "attention_mask": torch.ones_like(fed), "pixel_values": pixels, "image_grid_thw": grids}
    with silent():
        out = code.forward(**given, labels=fed.clone(), position_ids=torch.arange(fed.shape[1])[None])
        words = code.generate(**given, max_new_tokens=SAID)[0, fed.shape[1] :].tolist()
    pool = base.model.visual(pixels, grid_thw=grids).pooler_output  # (J, D)
    tail = out.inputs_embeds[0, len(ids) :].view(n, k + 1, -1) if n else pool.new_zeros(0, k + 1, pool.shape[1])
    places = [[int((pool == patch).all(1).nonzero()[0]) for patch in step[:k]] for step in tail]
    return {"chosen": places, "states": tail[:, k], "logits": out.logits[0, -1], "words": words}


@torch.no_grad()
def ours(base: Any, n: int, k: int, ids: tuple[int, ...], pixels: torch.Tensor, grids: torch.Tensor) -> dict[str, Any]:
    """The same by the engine."""
    reasoner = LatentReasoner(base, replace(REFERENCE, k=k))
    thoughts = reasoner.think(prompts(base, [Asked(ids, pixels, grids)]), n)
    logits = reasoner.say(thoughts.last)
    first, words = logits[0], [int(logits.argmax())]
    while len(words) < SAID and (len(words) == 1 or words[-1] != EOS):  # the released loop does not look at its first word
        words.append(int(reasoner.hear(thoughts, torch.tensor(words[-1:])).argmax()))
    return {"chosen": thoughts.chosen[0].tolist(), "states": thoughts.fed[0], "logits": first, "words": words}


def compare(place: Path, inputs: int, steps: tuple[int, ...] = (0, 1, 2, 3), ks: tuple[int, ...] = (1, 8, 32)) -> list[dict[str, Any]]:
    """One row for each n and K."""
    base = model(LAYERS, WIDTH, VOCABULARY)
    rows = []
    for n in steps:
        for k in ks:
            sets = words = 0
            gaps = {"states": 0.0, "logits": 0.0}
            for seed in range(inputs):
                one = prompt(12 + seed % 9, GRID, seed, VOCABULARY, torch.float64)
                their, our = theirs(base, place, n, k, *one), ours(base, n, k, *one)
                sets += [set(step) for step in their["chosen"]] == [set(step) for step in our["chosen"]]
                words += their["words"] == our["words"]
                for name in gaps:
                    gaps[name] = max([gaps[name], *(their[name] - our[name]).abs().flatten().tolist()])
            rows.append({"n": n, "k": k, "inputs": inputs, "sets_equal": sets, "words_equal": words, **gaps})
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--inputs", type=int, default=20)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "latent_reference.json")
    chosen = options.parse_args()
    place = checkout()
    if place is None:
        options.error(HOW)
    torch.set_num_threads(1)
    rows = compare(place, chosen.inputs)
    for row in rows:
        equal = f"sets {row['sets_equal']}/{row['inputs']}, words {row['words_equal']}/{row['inputs']}"
        print(f"n {row['n']}  K {row['k']:2}  {equal}, states within {row['states']:.1e}, logits within {row['logits']:.1e}")
    total = sum(row["inputs"] for row in rows)
    ratio = {
        "inputs": total,
        "sets_equal": sum(row["sets_equal"] for row in rows),
        "words_equal": sum(row["words_equal"] for row in rows),
        "largest_difference": max(max(row["states"], row["logits"]) for row in rows),
        "target": TOLERANCE,
    }
    machine = f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}, float64, 1 thread"
    facts = {"name": "latent_reference", "command": f"python bench/latent_reference.py --inputs {chosen.inputs}", "machine": machine}
    chosen.json.write_text(json.dumps({**facts, "rows": rows, "ratio": ratio}, indent=2) + "\n")
    print(ratio)


if __name__ == "__main__":
    main()
