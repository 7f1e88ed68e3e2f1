"""How long a run takes to open in the page, and how smoothly its list scrolls, in real headless Chromium.

    python bench/page.py [--episodes 10000] [--repeats 5] [--run RUN] [--json bench/results/page.json]

Two arms that take turns within a repeat: the run served by ``monologue view``, and the same run as one file. Each repeat starts a new
server and a new browser context, so nothing is cached but the files of the operating system. Figures are seconds from the navigation:

    first     rows of the list are on the screen
    opened    all episodes are listed and the first of them is shown with its turns
    complete  what filters look through is there as well: roles, faults, the text of outputs
    command   (served) ``monologue view`` has printed the address; for the file, it has been written
    frames    milliseconds between animation frames while the list scrolls 60 rows a frame for 200 frames: median, 95th percentile, most

The run is one of the scripted engine, made here unless given. ``ratio`` is the median time to ``opened`` of the served run over 3 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from chromium import browser, command, environment, served

TARGET = 3.0
SCROLL = """async () => {
  const list = document.getElementById('list'), gaps = [];
  let before = await new Promise(requestAnimationFrame);
  for (let frame = 0; frame < 200; frame++) {
    list.scrollTop += 60 * 58;
    const now = await new Promise(requestAnimationFrame);
    gaps.push(now - before);
    before = now;
  }
  return [gaps, list.scrollTop];
}"""


def opened(chromium: Any, url: str, episodes: int) -> dict[str, Any]:
    """One visit."""
    page = chromium.new_context(viewport={"width": 1400, "height": 900}).new_page()
    begun = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector(".row", timeout=120_000)
    first = time.perf_counter() - begun
    listed = f"{episodes:,} episode{'' if episodes == 1 else 's'}"
    page.wait_for_selector(f".sum:has-text('{listed}')", timeout=120_000)
    page.wait_for_selector(".turn", timeout=120_000)
    whole = time.perf_counter() - begun
    page.wait_for_selector(".sum:not(:has-text('reading'))", timeout=120_000)
    page.wait_for_load_state()
    complete = time.perf_counter() - begun
    gaps, _ = page.evaluate(SCROLL)
    page.context.close()
    return {"first": first, "opened": whole, "complete": complete, "frames": gaps}


def visits(chromium: Any, run: Path, file: Path, episodes: int) -> dict[str, dict[str, Any]]:
    """One visit of each arm."""
    begun = time.perf_counter()
    with served(run) as url:
        started = time.perf_counter() - begun
        by_server = {**opened(chromium, url, episodes), "command": started}
    begun = time.perf_counter()
    subprocess.run(command("view", run, "--html", file), check=True, env=environment(), stdout=subprocess.DEVNULL)
    written = time.perf_counter() - begun
    return {"served": by_server, "one file": {**opened(chromium, file.as_uri(), episodes), "command": written}}


def row(arm: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians with least and most over the repeats; frames of all repeats together."""
    result: dict[str, Any] = {"arm": arm, "repeats": len(found)}
    for name in ("command", "first", "opened", "complete"):
        values = [one[name] for one in found]
        result[name] = round(statistics.median(values), 3)
        result[f"{name}_least"], result[f"{name}_most"] = round(min(values), 3), round(max(values), 3)
    gaps = sorted(gap for one in found for gap in one["frames"])
    result["frame_ms"] = round(statistics.median(gaps), 2)
    result["frame_ms_95"] = round(gaps[int(0.95 * len(gaps))], 2)
    result["frame_ms_most"] = round(gaps[-1], 2)
    result["frames_over_50_ms"] = sum(gap > 50 for gap in gaps)
    result["frames"] = len(gaps)
    return result


def measure(run: Path, repeats: int, scratch: Path) -> tuple[list[dict[str, Any]], int, float]:
    """Rows, episodes of the run, and MB of the file."""
    episodes = sum(line.startswith(b'{"record":"episode_start"') for file in (run / "spans").glob("*.jsonl") for line in file.open("rb"))
    file = scratch / "page.html"
    found: dict[str, list[dict[str, Any]]] = {}
    with browser() as chromium:
        for _ in range(repeats):
            for arm, one in visits(chromium, run, file, episodes).items():
                found.setdefault(arm, []).append(one)
    return [row(arm, one) for arm, one in found.items()], episodes, round(file.stat().st_size / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a run folder that exists, in place of a new one")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "page.json", help="where to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run = options.run or scratch / "run"
        if options.run is None:
            words = ("play", "--backend", "scripted", "--n", options.episodes, "--out", run)
            subprocess.run(command(*words), check=True, env=environment(), stdout=subprocess.DEVNULL)
        rows, episodes, megabytes = measure(run, options.repeats, scratch)
        spans = sum(file.stat().st_size for file in (run / "spans").glob("*.jsonl"))
    result = {
        "name": "page",
        "command": f"python bench/page.py --episodes {episodes} --repeats {options.repeats}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "episodes": episodes,
        "run_mb": round(spans / 1e6, 1),
        "file_mb": megabytes,
        "rows": rows,
        "ratio": round(rows[0]["opened"] / TARGET, 3),
        "ratio_of": f"median seconds to open the served run over {TARGET:.0f} s",
        "met": rows[0]["opened"] < TARGET,
    }
    for one in rows:
        print(json.dumps(one))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
