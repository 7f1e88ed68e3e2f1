"""``monologue view``: a run as a page that is served or written, or in the terminal as a list or a replay."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from monologue.backends.places import STARTERS
from monologue.output import write_text
from monologue.tables import table
from monologue.usage import UsageError


def view(options: argparse.Namespace) -> int:
    """Shows a run: as a page that is served or written, or in the terminal as a list or a replay."""
    if options.episode == "" or (options.svg and not options.episode):
        raise UsageError(
            "--episode takes the beginning of an episode's id, and --svg goes with it; list the ids with monologue view RUN --list"
        )
    if options.html and (options.episode or options.list):
        raise UsageError("--html writes the whole run as a page; leave --episode and --list away")
    if options.episode:
        return replay_episode(options)
    if options.list:
        return list_episodes(options)
    for file in options.tokenizer:
        if not file.is_file():
            raise UsageError(f"--tokenizer {str(file)!r} is no file; give a tokenizer.json")
    tokenizers = (*options.tokenizer, *sorted(STARTERS.glob("*/tokenizer.json")))
    if options.html:
        return write_page(options.folder, options.html, tokenizers)
    return serve_page(options, tokenizers)


def replay_episode(options: argparse.Namespace) -> int:
    from rich.console import Console

    from monologue.traces.store import RunReader
    from monologue.traces.terminal import replay

    reader = RunReader(options.folder)
    found = [episode for episode in reader.episodes() if episode.start.episode_id.startswith(options.episode)]
    if len(found) != 1:
        raise UsageError(
            f"{len(found)} episodes of {str(options.folder)!r} begin with {options.episode!r}; list them with monologue view RUN --list"
        )
    console = Console(highlight=False, record=options.svg is not None)
    replay(reader, found[0], console)
    if options.svg:
        write_text(options.svg, without_web_fonts(console.export_svg(title="monologue view")))
    return 0


def list_episodes(options: argparse.Namespace) -> int:
    from monologue.traces.store import RunReader

    rows = []
    for episode in RunReader(options.folder).episodes():
        start, end = episode.start, episode.end
        gold = "" if start.gold is None else start.choices[start.gold]
        answer = "-" if end is None or end.answer is None else end.answer
        rows.append([start.episode_id[:12], start.family, start.question, answer, gold, end.status if end else "unfinished"])
    table(["episode", "family", "question", "answer", "gold", "status"], rows)
    return 0


def write_page(run: Path, file: Path, tokenizers: tuple[Path, ...]) -> int:
    from monologue.traces.page.export import export

    count = export(run, file, tokenizers)
    print(f"{count} episodes, {file.stat().st_size / 1e6:.1f} MB, written to {file}")
    return 0


def serve_page(options: argparse.Namespace, tokenizers: tuple[Path, ...]) -> int:
    """Serves until Ctrl-C."""
    from monologue.traces.page.serve import Desk, PageServer

    desk = Desk(options.folder, tokenizers)
    try:
        server = PageServer(desk, options.port)
    except OSError as error:
        raise UsageError(f"cannot serve on port {options.port}: {error.strerror}; leave --port away to take a free one") from error
    print(f"{server.url}\nThe address holds a secret: who has it can read the run and annotate it. Ctrl-C ends.", flush=True)
    if not options.no_browser and has_display():
        import webbrowser

        webbrowser.open(server.url)
    try:
        server.run()
    except KeyboardInterrupt:
        print()
    return 0


def has_display() -> bool:
    """A browser can show itself to the person at the keyboard."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def without_web_fonts(svg: str) -> str:
    """The picture without the fonts that it would fetch from the net."""
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
