"""The model card of the starter policies, made from what training left: ``python -m monologue.training.starter.card``.

Writes ``backends/starter/README.md`` and ``curves.svg`` from each policy's ``card.json`` and ``curve.jsonl``, so no figure is typed by
hand. A test holds the shipped page to what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monologue.backends.places import STARTERS

POLICIES = ("questioner", "answerer", "direct", "speaker", "thinker")
ABOUT = {
    "questioner": "Text-only Qwen3-class model. Asks, concludes, gives its reasons where the family needs them. Never sees a picture.",
    "answerer": "Qwen2-VL-class model. Sees one picture of 84 x 84 pixels as 9 visual tokens and answers one-hop questions in one word.",
    "direct": "Qwen2-VL-class model with twice the layers: the rival, which answers whole problems in one shot.",
    "speaker": "Qwen2-VL-class model of three layers and width 64 that takes every seat of the hops world, out loud.",
    "thinker": "The speaker after its monologues were internalised: latent steps, as many as a problem has look-ups, then the answer.",
}
INTRODUCTION = """# Starter policies

Small policies for the shapes world, and two for the world of hops, trained from nothing by this project's own commands on one processor
core each. They know 139 words (46 in the world of hops); they show that the machinery works, and are where training begins. Scores are of
validation problems, greedy.

This page is made by `python -m monologue.training.starter.card` from the files beside it.

![loss while training](curves.svg)
"""
COLOURS = {"questioner": "#0b7285", "answerer": "#2b8a3e", "direct": "#c92a2a", "speaker": "#5f3dc4", "thinker": "#e67700"}
WIDTH, HEIGHT, MARGIN = 720, 300, 46


def home() -> Path:
    """Where the shipped checkpoints lie."""
    return STARTERS


def read_curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def page(folder: Path) -> str:
    """The card as markdown."""
    return "\n".join([INTRODUCTION, *(_policy(name, folder / name) for name in POLICIES)])


def _policy(name: str, folder: Path) -> str:
    card = json.loads((folder / "card.json").read_text())
    size = (folder / "model.safetensors").stat().st_size / 1e6
    facts = {
        "command": f"`{card['command']}`",
        "seed": card["seed"],
        "parameters": f"{card['parameters']:,} ({size:.1f} MB, bfloat16)",
        "stages": ", ".join(f"{stage['name']} ({stage['steps']} steps of {stage['batch']})" for stage in card["stages"]),
        "processor seconds": f"{card['cpu_seconds']:,} on one core",
        "torch": card["torch"],
        "training data": f"generator with sha256 `{card['world_sha256'][:16]}` of its first 100 problems, pixels included",
        "weights": f"sha256 `{card['weights_sha256'][:16]}`",
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    scores = "".join(f"| {key} | {value:.4f} |\n" for key, value in card["validation"].items())
    notes = "".join(f"\n{note}\n" for note in card.get("notes", ()))
    table = f"| | |\n|---|---|\n{rows}\n| validation | accuracy |\n|---|---|\n{scores}"
    return f"## {name}\n\n{ABOUT[name]}\n{notes}\n{table}"


def curves(folder: Path) -> str:
    """Loss (square-root scale) over each policy's own training, by steps, as SVG."""
    found = {name: _by_share(read_curve(folder / name)) for name in POLICIES}
    highest = max(loss for curve in found.values() for _, loss in curve)

    def place(share: float, loss: float) -> tuple[float, float]:
        return MARGIN + (WIDTH - 2 * MARGIN) * share, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (loss / highest) ** 0.5

    def line(curve: list[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))

    lines = [f'<polyline fill="none" stroke="{COLOURS[name]}" points="{line(curve)}"/>' for name, curve in found.items()]
    names = [
        f'<text x="{WIDTH - MARGIN - 90}" y="{MARGIN + 16 * i}" fill="{COLOURS[name]}">{name}</text>' for i, name in enumerate(POLICIES)
    ]
    marks = [(0.0, "0"), (0.25, "a quarter"), (0.5, "half"), (0.75, "three quarters of its steps")]
    ticks = [f'<text x="{place(share, 0)[0]:.0f}" y="{HEIGHT - MARGIN + 18}">{text}</text>' for share, text in marks]
    levels = [f'<text x="6" y="{place(0, loss)[1]:.0f}">{loss:g}</text>' for loss in (0.05, 0.5, 1, 2, 4) if loss < highest]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#495057">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *lines, *names, *ticks, *levels, "</svg>"]) + "\n"


def _by_share(points: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Loss by the share of all steps; each stage counts its own from zero."""
    before, last, stage, found = 0, 0, None, []
    for point in points:
        if point["stage"] != stage:
            before, stage = before + last, point["stage"]
        last = point.get("at", point["step"])
        found.append((before + last, point["loss"] if "loss" in point else point["words"]))
    return [(step / (before + last), loss) for step, loss in found]


def main() -> None:
    folder = home()
    (folder / "README.md").write_text(page(folder))
    (folder / "curves.svg").write_text(curves(folder))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
