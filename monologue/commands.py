"""What each command does. Thin: it reads options, seats policies, calls a room, prints what came of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monologue.tables import clean, table
from monologue.tasks.base import Problem, Task, TaskError
from monologue.tasks.own import own_problem
from monologue.tasks.shapes import Looks, Shapes
from monologue.traces.images import PictureError, open_picture
from monologue.traces.store import RunError
from monologue.usage import UsageError

if TYPE_CHECKING:
    from monologue.graphs.summary import Summary

BACKENDS = ("transformers", "scripted")
CONTROLS = ("shuffle-answers", "wrong-picture")
TASKS: dict[str, Callable[[], Task]] = {"shapes": Shapes, "looks": Looks}


def user_errors() -> tuple[type[Exception], ...]:
    """Errors that the person at the keyboard can mend; only classes whose modules are loaded can have been raised."""
    wanted = {
        "monologue.graphs.state": "GraphError",
        "monologue.agents.codec": "CodecError",
        "monologue.backends.base": "BackendError",
        "monologue.training.starter.make": "RecipeError",
    }
    found = [getattr(sys.modules[module], name) for module, name in wanted.items() if module in sys.modules]
    return (UsageError, TaskError, PictureError, RunError, *found)


def play(options: argparse.Namespace) -> int:
    """Plays problems of a task, or one of your own, into a run folder."""
    warn_of_uploads()
    task = task_of(options)
    problems = problems_of(options, task)
    from monologue.graphs.play import play as play_graph
    from monologue.live import Live
    from monologue.seating import config_of, seats

    out = options.out or new_run(options.graph)
    with seats(options.graph, options) as taken:
        summary = play_graph(
            options.graph,
            problems,
            taken,
            out,
            samples=options.samples,
            concurrency=1 if options.live else options.concurrency,
            seed=options.seed,
            max_turns=options.max_turns,
            control=options.control,
            score=task.score,
            progress=not options.live,
            resume=not options.no_resume,
            config=config_of(options),
            listener=Live(out) if options.live else None,
        )
    report(summary, out, options)
    return 1 if summary.failed else 0


def task_of(options: argparse.Namespace) -> Task:
    """The task, cut to the wanted families."""
    if options.families is None:
        return TASKS[options.task]()
    if options.task != "shapes":
        raise UsageError(f"--families belongs to the task 'shapes', not to {options.task!r}")
    return Shapes(tuple(options.families.split(",")))


def problems_of(options: argparse.Namespace, task: Task) -> list[Problem]:
    """The task's problems, or the user's own one."""
    own = (options.image, options.question, options.choices)
    if any(part is not None for part in own):
        if options.image is None or options.question is None:
            raise UsageError("an own problem needs both --image FILE and --question TEXT, and usually --choices A B ...")
        picture = open_picture(options.image)
        return [own_problem(lambda: picture, options.question, options.choices or ())]
    if options.n < 1:
        raise UsageError(f"--n must be at least 1, got {options.n}")
    return list(task.problems(options.split, options.n, 0))


def new_run(graph: str) -> Path:
    return Path("runs") / f"{graph.replace(':', '-').replace('=', '')}-{time.strftime('%Y%m%d-%H%M%S')}"


def report(summary: Summary, out: Path, options: argparse.Namespace) -> None:
    """What came of a play, and how to look at it."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    scored = [episode for episode in summary.episodes if episode.score is not None]
    if scored:
        score = summary.score()
        console.print(f"accuracy {score.accuracy:.3f} ± {score.stderr:.3f}  (n = {score.n}, chance {score.chance:.3f})")
    elif summary.ok:
        for episode in summary.episodes:
            answer = "no answer within its budget" if episode.answer is None else episode.answer
            console.print(f"answer: {escape(clean(answer))}")
    for episode in summary.failed[:5]:
        console.print(f"failed: {episode.problem_id}: {escape(clean(episode.error or 'unknown'))}")
    kept = f", {summary.skipped} of them from before" if summary.skipped else ""
    console.print(f"{summary.ok} episodes ended well{kept}, {len(summary.failed)} failed")
    console.print(f"trace: {escape(str(out))}", soft_wrap=True)
    console.print(f"look:  monologue view {escape(str(out))}", soft_wrap=True)
    console.print(f"check: monologue verify {escape(str(out))}", soft_wrap=True)


def warn_of_uploads() -> None:
    """One line when the environment would send prompts to a third party."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        if os.environ.get(name, "").lower() in ("true", "1"):
            print(
                f"monologue: {name} is set, so LangGraph sends prompts to its maker's service; unset it to keep them here",
                file=sys.stderr,
            )


def evaluate(options: argparse.Namespace) -> int:
    """Plays several graphs on the same problems and prints one table."""
    from monologue.evaluation import evaluate_graphs

    warn_of_uploads()
    task = task_of(options)
    if options.n < 1:
        raise UsageError(f"--n must be at least 1, got {options.n}")
    with tempfile.TemporaryDirectory() as scratch:
        rows = evaluate_graphs(options, task, options.out or Path(scratch))
    if options.json:
        write_json(options.json, rows)
    return 1 if any(row["failed"] for row in rows) else 0


def without_web_fonts(svg: str) -> str:
    """The picture without the fonts that it would fetch from the net."""
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}; name a file in a folder that you may write to") from error


def verify(options: argparse.Namespace) -> int:
    """Prints a table of checks; 1 where one does not hold."""
    from monologue.traces.verify import verify as check_run

    checks = check_run(options.folder)
    table(
        ["check", "holds", "figure", "detail"],
        [[c.name, "yes" if c.ok else "NO", str(c.figure), c.detail or ""] for c in checks],
    )
    if options.json:
        plain = [{"name": c.name, "ok": c.ok, "figure": c.figure, "span": c.span, "detail": c.detail} for c in checks]
        write_json(options.json, {"checks": plain})
    return 0 if all(check.ok for check in checks) else 1


def view(options: argparse.Namespace) -> int:
    """Shows a run: as a page that is served or written, or in the terminal as a list or a replay."""
    if options.svg and not options.episode:
        raise UsageError("--svg belongs to --episode ID: it writes the replay of one episode")
    if options.html and (options.episode or options.list):
        raise UsageError("--html writes the whole run as a page; leave --episode and --list away")
    if options.episode:
        return replay_episode(options)
    if options.list:
        return list_episodes(options)
    tokenizers = tuple(options.tokenizer)
    for file in tokenizers:
        if not file.is_file():
            raise UsageError(f"--tokenizer {str(file)!r} is no file; give a tokenizer.json")
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


def train(options: argparse.Namespace) -> int:
    """Trains a starter policy."""
    from monologue.training.starter.make import choose, make, override, read_recipe

    recipe = override(read_recipe(options.recipe), options.set)
    if options.only:
        recipe = choose(recipe, options.only)
    if options.dry_run:
        print(json.dumps(recipe, indent=1))
        return 0
    out = options.out or Path("runs") / recipe["policy"]
    card = make(recipe, out, options.start)
    table(["examination", "score"], [[name, f"{value:.4f}"] for name, value in card["validation"].items()])
    print(f"{card['parameters']} parameters, {card['cpu_seconds']} processor seconds, written to {out}")
    return 0


def tasks(options: argparse.Namespace) -> int:
    """Lists the tasks, or shows problems of one."""
    if options.name is None:
        table(["task", "splits"], [[name, ", ".join(TASKS[name]().splits)] for name in sorted(TASKS)])
        return 0
    for problem in TASKS[options.name]().problems(options.split, options.n):
        show_problem(problem)
    return 0


def show_problem(problem: Problem) -> None:
    from rich.console import Console
    from rich.markup import escape

    from monologue.traces.terminal import half_blocks

    console = Console(highlight=False)
    for picture in problem.pictures:
        console.print(half_blocks(picture(), width=42))
    gold = "" if problem.gold is None else problem.choices[problem.gold]
    console.print(escape(f"[{problem.family}, {problem.hops} hops] {problem.question}  ({' | '.join(problem.choices)})  gold: {gold}"))
    for turn in problem.oracle or ():
        console.print(f"   {escape(turn.question)}  [bold]{escape(turn.reply)}[/bold]")
