"""The README's pictures of the page, light and dark, from a run played for them.

    python bench/screenshots.py [--run RUN] [--out docs]

Plays the shapes world with the shipped policies at a temperature at which they err, and photographs an episode that went wrong
within a group that did not agree, in real headless Chromium.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from chromium import ROOT, browser, command, environment, served

PLAY = ("play", "--n", 60, "--samples", 4, "--temperature", 1.6, "--families", "near,kin,twins,compare,total")


MARK = """() => {
  const strength = (one) => parseFloat(one.style.getPropertyValue('--strength'));
  const tokens = [...document.querySelectorAll('.token')].sort((a, b) => strength(b) - strength(a));
  tokens[0].classList.add('least');
}"""


def chosen(rows: list[dict[str, Any]]) -> str:
    """An episode of five turns that went wrong while another of its group went right."""
    right = {row["group"] for row in rows if row["reward"] == 1}
    mixed = [row for row in rows if row["reward"] == 0 and row["group"] in right and row["status"] == "ok"]
    return str(min(mixed or rows, key=lambda row: (abs(row["turns"] - 5), row["number"]))["id"])


def photograph(run: Path, out: Path) -> None:
    with served(run) as url, browser() as chromium:
        for scheme, view in (("light", "episode"), ("dark", "group")):
            context = chromium.new_context(viewport={"width": 1440, "height": 1080}, color_scheme=scheme, device_scale_factor=1)
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector(".sum:not(:has-text('reading'))")
            listing = context.request.get(f"{url}api/index?after=0").json()
            rows = [dict(zip(("number", *listing["fields"]), values, strict=True)) for values in listing["rows"]]
            page.goto(f"{url}#episode={chosen(rows)}&view={view}")
            page.reload()
            page.wait_for_selector(".turn")
            if view == "episode":
                page.evaluate(MARK)
                page.hover(".least")
            page.wait_for_timeout(400)
            page.screenshot(path=out / f"page-{scheme}.png")
            context.close()


def player() -> list[str]:
    """The interpreter that has torch: the project's own where ``make`` has made it."""
    own = ROOT / ".venv" / "bin" / "python"
    return [str(own) if own.exists() else sys.executable]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run folder that exists, in place of a new one")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = options.run or Path(name) / "shapes"
        if options.run is None:
            words = [*player(), *command(*PLAY, "--out", run)[1:]]
            subprocess.run(words, check=True, env=environment(), stdout=subprocess.DEVNULL)
        photograph(run, options.out)


if __name__ == "__main__":
    main()
