"""The same checkpoint through SGLang and in process: are the tokens the same, and how far apart are the log-probs?

    python bench/parity.py [--n 600] [--questioner URL --answerer URL] [--device cpu --python .venv-sglang/bin/python] [--json FILE]

Prompts as they stand in dialogues of the oracle (the answerer's with their picture), random ids, and random ids with up to three noisy
pictures of odd sizes; a third each. Every prompt is continued greedily by both and must give the same tokens. The log-prob table holds the
absolute difference in nats of the sampled tokens, and of the same tokens scored under both. Without addresses the starter policies are
served by servers of its own. It can lose: any prompt with other tokens is counted and shown; on a GPU in bfloat16 some will be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL.Image import effect_noise, merge

from monologue.backends.base import Generation, Picture, Prompt, Sampling
from monologue.backends.hf import HFBackend
from monologue.backends.serving.launch import launch
from monologue.backends.sglang import SGLangBackend
from monologue.cli import main as monologue
from monologue.seating import starter
from monologue.traces.store import RunReader

EOS = 2
GREEDY = Sampling(temperature=0.0, max_tokens=16, stop_ids=(EOS,))
SIZES = ((84, 84), (150, 90), (61, 200), (333, 334), (640, 480))


def spoken(role: str, n: int) -> list[Prompt]:
    """Prompts of the oracle's dialogues."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["play", "--questioner", "oracle", "--answerer", "oracle", "--split", "validation", "--n", str(n), "--out", str(run)]
        assert monologue(words) == 0
        reader = RunReader(run)
        calls = [call for episode in reader.episodes() for call in episode.calls() if call.role == role][:n]
        return [
            Prompt(call.prompt_ids, tuple(Picture(i.sha256, reader.picture(i.sha256)) for i in call.images), call.episode_id)
            for call in calls
        ]


def strange(own: HFBackend, n: int, pictures: int) -> list[Prompt]:
    """Random ids with 1 to ``pictures`` noisy pictures of odd sizes, or none."""
    dice, found = random.Random(pictures), list[Prompt]()
    vocab: Any = own.tokenizer.get_vocab()
    first, last = len(own.tokenizer.all_special_ids), len(vocab)
    opening, closing = vocab["<|vision_start|>"], vocab["<|vision_end|>"]
    for number in range(n):
        ids, shown = [dice.randrange(first, last) for _ in range(dice.randrange(2, 100))], list[Picture]()
        for _ in range(dice.randrange(1, pictures + 1) if pictures else 0):
            size = dice.choice(SIZES)
            image = merge("RGB", [effect_noise(size, dice.uniform(20, 120)) for _ in "RGB"])
            shown.append(Picture(f"{number}/{len(shown)}", image))
            ids += [opening, *[own.image_token_id or 0] * own.placeholders(image).count, closing, dice.randrange(first, last)]
        found.append(Prompt(tuple(ids), tuple(shown), str(number)))
    return found


async def compare(kind: str, served: SGLangBackend, own: HFBackend, prompts: Sequence[Prompt]) -> dict[str, Any]:
    theirs: list[Generation] = await asyncio.gather(*(served.generate(prompt, GREEDY) for prompt in prompts))
    ours: list[Generation] = await asyncio.gather(*(own.generate(prompt, GREEDY) for prompt in prompts))
    same = [place for place, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a.ids == b.ids]
    sampled = [abs(a - b) for i in same for a, b in zip(theirs[i].logprobs or (), ours[i].logprobs or (), strict=True)]
    pairs = list(zip(prompts, ours, strict=True))
    theirs_scored = await asyncio.gather(*(served.score(prompt, one.ids, Sampling()) for prompt, one in pairs))
    ours_scored = await asyncio.gather(*(own.score(prompt, one.ids, Sampling()) for prompt, one in pairs))
    scored = [abs(a - b) for x, y in zip(theirs_scored, ours_scored, strict=True) for a, b in zip(x, y, strict=True)]
    first = next((i for i in range(len(prompts)) if i not in set(same)), None)
    return {
        "prompts": kind,
        "n": len(prompts),
        "same_tokens": len(same),
        "pictures": sum(len(prompt.pictures) for prompt in prompts),
        "tokens": len(sampled),
        **{f"sampled_{name}": value for name, value in spread(sampled).items()},
        **{f"scored_{name}": value for name, value in spread(scored).items()},
        "first_other": None if first is None else {"served": theirs[first].ids, "in process": ours[first].ids},
    }


def spread(gaps: list[float]) -> dict[str, float]:
    ordered = sorted(gaps)
    return {"mean": statistics.fmean(gaps), "p99": ordered[int(0.99 * (len(ordered) - 1))], "max": ordered[-1]}


async def measure(urls: dict[str, str], n: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, facts = list[dict[str, Any]](), dict[str, Any]()
    for role, url in urls.items():
        served, own = SGLangBackend(url), HFBackend(starter(role))
        kinds = {
            f"{role}: dialogues": await asyncio.to_thread(spoken, role, n // 3 - n // 6),
            f"{role}: random ids": strange(own, n // 6, 0),
        }
        if own.facts.sees:
            kinds[f"{role}: random ids and pictures"] = strange(own, n // 3, 3)
        rows += [await compare(kind, served, own, prompts) for kind, prompts in kinds.items()]
        facts = {"sglang": served.facts.engine_version, "served in": served.facts.extra["dtype"], "device": served.facts.extra["device"]}
        await served.aclose()
        await own.aclose()
    return rows, facts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--n", type=int, default=600)
    for role in ("questioner", "answerer"):
        options.add_argument(f"--{role}", metavar="URL", help="a server of this starter policy that runs already")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--dtype", default="float32")
    options.add_argument("--python", default=".venv-sglang/bin/python", help="the Python in which sglang is installed")
    options.add_argument("--flag", action="append", default=[], help="a further flag of the servers, e.g. --flag=--mem-fraction-static=0.4")
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "parity.json")
    chosen = options.parse_args()
    with ExitStack() as running:
        urls = {}
        for role in ("questioner", "answerer"):
            urls[role] = getattr(chosen, role)
            if urls[role] is None:
                log = Path(running.enter_context(tempfile.TemporaryDirectory())) / "log"
                start = {"python": chosen.python, "device": chosen.device, "dtype": chosen.dtype, "flags": chosen.flag}
                urls[role] = running.enter_context(launch(str(starter(role)), log=log, **start)).url
        rows, facts = asyncio.run(measure(urls, chosen.n))
    for row in rows:
        told = ", ".join(f"{name} {row[f'{kind}_{name}']:.1e}" for kind in ("sampled", "scored") for name in ("mean", "max"))
        print(f"{row['prompts']:36} same tokens {row['same_tokens']}/{row['n']}, {row['pictures']} pictures, |difference| {told}")
    n, same = sum(row["n"] for row in rows), sum(row["same_tokens"] for row in rows)
    worst = max(max(row["sampled_max"], row["scored_max"]) for row in rows)
    print(f"{same} of {n} prompts with the same tokens, largest difference {worst:.1e} nats")
    machine = f"{platform.machine()}, Python {platform.python_version()}, " + ", ".join(f"{key} {value}" for key, value in facts.items())
    ratio = {"prompts": n, "same tokens": same, "largest difference": worst}
    result = {"name": "parity", "command": f"python bench/parity.py --n {chosen.n}", "machine": machine, "rows": rows, "ratio": ratio}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
