"""What was asked on the command line, checked as a whole before anything is loaded or written: an option that cannot be honoured is
refused, never ignored. Options that were not given are None until ``settle`` fills in what they mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from monologue.tasks.base import Problem
from monologue.usage import UsageError

DEFAULTS = {"split": "test", "temperature": 0.0, "top_p": 1.0, "max_tokens": 64, "max_turns": 8, "concurrency": 64}
GRAPHS = "blind,direct,monologue"
"""What ``monologue eval`` plays unless told otherwise."""
OWN = ("image", "question", "choices")
ROLES = ("questioner", "answerer", "thinker")


def settle(options: argparse.Namespace, n: int) -> None:
    """Refuses what does not fit together, then fills in the defaults. Raises UsageError."""
    if options.backend == "scripted":
        _refuse(options, ("temperature", "top_p", "max_tokens"), "--backend scripted says its lines as they are")
    if own_problem_asked(options):
        _refuse(options, ("n", "split", "families", "folder"), "an own picture is one problem")
    _check_processes(options)
    _check_seats(options)
    given = options.n
    for name, value in {**DEFAULTS, "n": n}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if given is not None and given < 1:
        raise UsageError(f"--n must be at least 1, got {given}")
    if getattr(options, "samples", 1) > 1 and options.temperature == 0 and options.backend != "scripted":
        told = f"--samples {options.samples} at temperature 0 plays one episode {options.samples} times; --temperature 1 makes them differ"
        print(f"monologue: {told}", file=sys.stderr)


def settle_latent(options: argparse.Namespace) -> None:
    """The same for ``monologue eval latent``, which plays no graph. Raises UsageError."""
    why = "eval latent examines the latent steps of --thinker and plays no graph"
    _refuse(options, ("temperature", "top_p", "max_tokens", "control", "out", "concurrency", "max_turns"), why)
    others = [role for role in ROLES if role != "thinker" and getattr(options, role) != "starter"]
    _refuse(options, tuple(others), why)
    if options.graph != GRAPHS:
        raise UsageError(f"{why}, so --graph cannot be honoured; leave that out")
    if options.backend != "transformers" or options.processes != 1:
        raise UsageError("eval latent takes latent steps in this process; leave --backend and --processes out")
    if options.thinker == "oracle" or options.thinker.startswith(("http://", "https://", "chat:")):
        wanted = "--thinker is 'starter' or a folder that 'monologue train latent' wrote"
        raise UsageError(
            f"eval latent interferes with states, which an oracle, a server or a hosted model does not show: {wanted}, "
            f"got {options.thinker!r}"
        )
    if options.task == "shapes" and options.thinker == "starter":
        raise UsageError("the shipped thinker knows the world of hops; add --task hops, or name another --thinker")
    if options.n is not None and options.n < 2:
        raise UsageError(f"--n must be at least 2, since controls exchange thoughts between problems, got {options.n}")


def own_problem_asked(options: argparse.Namespace) -> bool:
    """Whether a picture, question or choices of the user's own were given."""
    return any(getattr(options, name, None) is not None for name in OWN)


def check_turns(options: argparse.Namespace, problems: Sequence[Problem]) -> None:
    """A recited dialogue is played to its end: one that was cut off would stand in the run without an answer. Raises UsageError."""
    from monologue.graphs.registry import listed

    recited = "monologue" in listed(options.graph) and (options.backend == "scripted" or options.questioner == "oracle")
    longest = 1 + max(len(problem.oracle or ()) for problem in problems)
    if recited and longest > options.max_turns:
        raise UsageError(
            f"the longest of these dialogues takes {longest} actions, more than {options.max_turns}; add --max-turns {longest}"
        )


def check_writable(file: Path | None) -> None:
    """Finds out before the work whether its result can be written. Raises UsageError."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.exists()
        with file.open("ab"):
            pass
        if not there:
            file.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {str(file)!r}: {error.strerror}; name a file in a folder that you may write to") from error


def _check_processes(options: argparse.Namespace) -> None:
    if options.processes < 1:
        raise UsageError(f"--processes must be at least 1, got {options.processes}")
    alone = ("live", "otlp", *OWN)
    if options.processes > 1 and (given := [f"--{name}" for name in alone if getattr(options, name, None)]):
        raise UsageError(f"--processes {options.processes} shares many episodes out; {' and '.join(given)} need one process")


def _check_seats(options: argparse.Namespace) -> None:
    from monologue.graphs.registry import find, listed

    used = {role for graph in listed(options.graph) for role in find(graph).roles}
    for role in ROLES:
        if getattr(options, role) != "starter" and role not in used:
            raise UsageError(f"--{role} names a policy, but {options.graph!r} has no such seat; its seats are {', '.join(sorted(used))}")


def _refuse(options: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name, None) is not None]
    if given:
        raise UsageError(f"{why}, so {' and '.join(given)} cannot be honoured; leave that out")
