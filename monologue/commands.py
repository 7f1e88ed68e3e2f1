"""What each command does. Thin: it reads options, seats policies, calls a room, prints what came of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from monologue.asked import check_turns, check_writable, own_problem_asked, settle
from monologue.output import write_json
from monologue.tables import clean, table
from monologue.tasks.base import Problem, Task, TaskError, taken
from monologue.tasks.corpora import CORPORA, SPLITS, Corpus
from monologue.tasks.dialogues import Dialogues
from monologue.tasks.hops import Hops
from monologue.tasks.own import own_problem
from monologue.tasks.shapes import Looks, Shapes
from monologue.traces.images import PictureError, decode, open_picture
from monologue.traces.store import RunError
from monologue.uploads import uploads
from monologue.usage import UsageError

if TYPE_CHECKING:
    from monologue.graphs.summary import Summary

BACKENDS = ("transformers", "sglang", "scripted")
CONTROLS = ("shuffle-answers", "wrong-picture")
TASKS: dict[str, Callable[[], Task]] = {"shapes": Shapes, "looks": Looks, "hops": Hops}
WITH_FAMILIES: dict[str, Callable[[Sequence[str]], Task]] = {"shapes": Shapes, "hops": Hops}
WITH_FOLDER: dict[str, Callable[[Path], Task]] = {
    "dialogues": partial(Dialogues, decode=decode),
    **{name: partial(Corpus, name, decode=decode) for name in CORPORA},
}
"""Tasks whose problems lie in files of the user's."""
NAMES = sorted((*TASKS, *WITH_FOLDER))


def user_errors() -> tuple[type[Exception], ...]:
    """Errors that the person at the keyboard can mend; only classes whose modules are loaded can have been raised."""
    wanted = {
        "monologue.graphs.state": "GraphError",
        "monologue.agents.codec": "CodecError",
        "monologue.backends.base": "BackendError",
        "monologue.training.recipe": "RecipeError",
        "monologue.training.rows": "RowError",
        "monologue.training.gate": "GateError",
        "monologue.training.judges": "JudgeError",
        "monologue.traces.extras": "ExportError",
        "monologue.training.dataset": "MissingExtra",
        "monologue.training.exports.writing": "ExportError",
        "monologue.training.rationales": "RationaleError",
    }
    found = [getattr(sys.modules[module], name) for module, name in wanted.items() if module in sys.modules]
    return (UsageError, TaskError, PictureError, RunError, *found)


def play(options: argparse.Namespace) -> int:
    """Plays problems of a task, or one of your own, into a run folder."""
    warn_of_uploads()
    if options.live and options.capture == "shape":
        raise UsageError("--live shows what --capture shape keeps out; give one of them")
    settle(options, 20)
    task = task_of(options)
    problems = problems_of(options, task)
    check_turns(options, problems)
    from monologue.exports import listeners
    from monologue.live import Live
    from monologue.seating import config_of, player

    options.out = out = options.out or new_run(options.graph)
    shown = Live(out) if options.live else None
    with listeners(out, shown, options) as listener, player(options.graph, options) as play_all:
        summary = play_all(
            problems,
            out,
            samples=options.samples,
            concurrency=1 if options.live else options.concurrency,
            seed=options.seed,
            max_turns=options.max_turns,
            control=options.control,
            score=task.score,
            progress=not options.live,
            resume=not options.no_resume,
            deadline=options.deadline,
            retries=options.retries,
            config=config_of(options),
            listener=listener,
            capture=options.capture,
        )
    report(summary, out, options)
    return 1 if summary.failed else 0


def task_of(options: argparse.Namespace) -> Task:
    """The task that was asked for."""
    return named_task(options.task, options.families, options.folder)


def named_task(name: str, families: str | None, folder: Path | None = None) -> Task:
    """A task, cut to the wanted families, or from a folder. Raises UsageError, TaskError."""
    if families and name not in WITH_FAMILIES:
        raise UsageError(f"families belong to the tasks {' and '.join(map(repr, WITH_FAMILIES))}, not to {name!r}")
    if folder is not None and name not in WITH_FOLDER:
        raise UsageError(f"--folder belongs to the tasks {', '.join(map(repr, WITH_FOLDER))}, not to {name!r}; leave it out")
    if name in WITH_FOLDER and folder is None:
        raise UsageError(f"the task {name!r} is read from files; add --folder DIR")
    if folder is not None:
        return WITH_FOLDER[name](folder)
    return WITH_FAMILIES[name](tuple(families.split(","))) if families else TASKS[name]()


def problems_of(options: argparse.Namespace, task: Task) -> list[Problem]:
    """The task's problems, or the user's own one."""
    if own_problem_asked(options):
        if options.image is None or options.question is None:
            raise UsageError("an own problem needs both --image FILE and --question TEXT, and usually --choices A B ...")
        picture = open_picture(options.image)
        return [own_problem(lambda: picture, options.question, options.choices or ())]
    return taken(task, options.split, options.n)


def new_run(graph: str) -> Path:
    """A run folder that is not there yet."""
    name = f"{graph.replace(':', '-').replace('=', '')}-{time.strftime('%Y%m%d-%H%M%S')}"
    places = (Path("runs") / f"{name}{tail}" for tail in ("", *(f"-{number}" for number in range(2, 10000))))
    return next(path for path in places if not path.exists())


def kept(options: argparse.Namespace) -> str:
    """What an interrupted command leaves behind, and how to go on."""
    if options.verb == "play" and options.out is not None:
        return f"every finished episode is kept in {options.out}; the same command with --out {options.out} goes on from there"
    if options.verb == "eval" and options.out is not None:
        return f"every finished episode is kept in {options.out}; the same command goes on from there"
    if options.verb == "rewrite":
        return f"every dialogue that was written is kept in {options.out}; the same command goes on from there"
    if options.verb == "train" and options.stage in ("reinforce", "latent"):
        return "the run is kept; the same command with its --out and --resume goes on from the last checkpoint"
    return "nothing is kept" if options.verb in ("eval", "train", "play") else "nothing was changed"


def report(summary: Summary, out: Path, options: argparse.Namespace) -> None:
    """What came of a play, and how to look at it."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    scored = [episode for episode in summary.episodes if episode.score is not None]
    if scored:
        score = summary.score()
        console.print(f"accuracy {score}  (n = {score.n}, chance {score.chance:.3f})")
    elif summary.ok:
        for episode in summary.episodes:
            answer = "no answer within its budget" if episode.answer is None else episode.answer
            chosen = {choice.strip().lower() for choice in options.choices or ()}
            strange = "" if episode.answer is None or episode.answer.strip().lower() in chosen else "  (none of the choices)"
            console.print(f"answer: {escape(clean(answer))}{strange}")
    for episode in summary.failed[:5]:
        console.print(f"failed: {episode.problem_id}: {escape(clean(episode.error or 'unknown'))}")
    kept = f", {summary.skipped} of them from before" if summary.skipped else ""
    console.print(f"{summary.ok} episodes ended well{kept}, {len(summary.failed)} failed")
    if cached := summary.cached():
        console.print("prompt tokens from cache, by turn: " + ", ".join(f"{turn + 1}: {share:.0%}" for turn, share in cached.items()))
    console.print(f"trace: {escape(str(out))}", soft_wrap=True)
    console.print(f"look:  monologue view {escape(str(out))}", soft_wrap=True)
    console.print(f"check: monologue verify {escape(str(out))}", soft_wrap=True)


def warn_of_uploads() -> None:
    """One line for everything in the environment that would send prompts to a third party."""
    for line in uploads():
        print(f"monologue: {line}", file=sys.stderr)


def evaluate(options: argparse.Namespace) -> int:
    """Plays several graphs on the same problems and prints one table; or examines what a thinker's thoughts do."""
    if options.what == "latent":
        from monologue.interference import evaluate_latent

        return evaluate_latent(options, task_of(options))
    if options.controls:
        raise UsageError("--controls examines latent steps: monologue eval latent --controls; for graphs there is --control")
    from monologue.evaluation import evaluate_graphs

    warn_of_uploads()
    settle(options, 1000)
    task = task_of(options)
    check_writable(options.json)
    with tempfile.TemporaryDirectory() as scratch:
        rows = evaluate_graphs(options, task, options.out or Path(scratch))
    if options.json:
        write_json(options.json, rows)
    return 1 if any(row["failed"] for row in rows) else 0


def verify(options: argparse.Namespace) -> int:
    """Prints a table of checks; 1 where one does not hold."""
    from monologue.proof import verify as prove

    if options.calls is not None and options.calls < 1:
        raise UsageError(f"--calls must be at least 1, got {options.calls}; --no-replay leaves the replay out")
    given = dict(weights_of(setting) for setting in options.weights)
    checks = prove(options.folder, replay=options.replay, weights=given, tolerance=options.tolerance, calls=options.calls)
    table(
        ["check", "holds", "figure", "detail"],
        [
            [c.name, "yes" if c.ok else "NO", f"{c.figure:.3g}" if isinstance(c.figure, float) else str(c.figure), c.detail or ""]
            for c in checks
        ],
    )
    if options.json:
        plain = [{"name": c.name, "ok": c.ok, "figure": c.figure, "span": c.span, "detail": c.detail} for c in checks]
        write_json(options.json, {"checks": plain})
    return 0 if all(check.ok for check in checks) else 1


def weights_of(setting: str) -> tuple[str, str]:
    """``POLICY=FOLDER``."""
    policy, _, folder = setting.partition("=")
    if not policy or not folder:
        raise UsageError(f"--weights takes POLICY=FOLDER or POLICY@VERSION=FOLDER, got {setting!r}")
    return policy, folder


def tasks(options: argparse.Namespace) -> int:
    """Lists the tasks, or shows problems of one."""
    if options.n < 1:
        raise UsageError(f"--n must be at least 1, got {options.n}")
    if options.name is None:
        rows = [[name, ", ".join(TASKS[name]().splits), ""] for name in sorted(TASKS)]
        table(["task", "splits", "from"], [*rows, *([name, ", ".join(SPLITS), "--folder DIR"] for name in sorted(WITH_FOLDER))])
        return 0
    for problem in named_task(options.name, None, options.folder).problems(options.split, options.n):
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
