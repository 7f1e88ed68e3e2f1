"""Runs out to other tools and in again: ``monologue export``, ``monologue import``, ``monologue play --otlp``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from monologue.traces.schema import Record
from monologue.usage import UsageError

Listener = Callable[[Record], None]
TARGETS = ("otlp-json", "otlp", "phoenix", "inspect")
TRAINERS = ("trl", "verl", "verifiers")
PROTOCOLS = ("http", "grpc")


def export(options: argparse.Namespace) -> int:
    """Hands a run to another tool."""
    if options.to in TRAINERS:
        return _rows(options)
    if options.role or options.keep or options.shape:
        raise UsageError(f"--role, --keep and --shape choose rows for {', '.join(TRAINERS)}; --to {options.to} takes whole runs")
    file = options.to in ("otlp-json", "inspect")
    if file and options.out is None:
        raise UsageError(f"--to {options.to} writes a file; name it with --out FILE")
    if file and (options.endpoint is not None or options.protocol is not None):
        raise UsageError(f"--to {options.to} writes a file; --endpoint and --protocol belong to otlp and phoenix")
    if not file and options.endpoint is None:
        raise UsageError(f"--to {options.to} sends to a server; name it with --endpoint, e.g. --endpoint http://127.0.0.1:6006")
    if not file and options.out is not None:
        raise UsageError(f"--to {options.to} sends to a server; --out belongs to otlp-json and inspect")
    if options.to == "phoenix" and options.protocol == "grpc":
        raise UsageError("--to phoenix uses one http address for spans and rewards; for grpc give --to otlp")
    print({"otlp-json": _otlp_json, "otlp": _otlp, "phoenix": _phoenix, "inspect": _inspect}[options.to](options))
    return 0


def _rows(options: argparse.Namespace) -> int:
    """Writes the rows of a run for another trainer, and says what was written and what was left out."""
    if options.out is None:
        raise UsageError(f"--to {options.to} writes files; name their folder with --out DIR")
    if options.endpoint is not None or options.protocol is not None:
        raise UsageError(f"--to {options.to} writes files; --endpoint and --protocol belong to otlp and phoenix")
    if options.shape is not None and options.to != "trl":
        raise UsageError(f"--shape belongs to --to trl; {options.to} has shapes of its own")
    if options.to == "trl":
        from monologue.training.exports.trl import to_trl

        found = to_trl(options.folder, options.out, options.role, options.keep or "solved", options.shape or "ids")
    elif options.to == "verl":
        from monologue.training.exports.verl import to_verl

        found = to_verl(options.folder, options.out, options.role, options.keep or "solved")
    else:
        from monologue.training.exports.verifiers import to_verifiers

        found = to_verifiers(options.folder, options.out, options.role, options.keep or "all")
    for name, count in found.files.items():
        print(f"{count:6d}  {options.out / name}")
    for cause, count in sorted(found.left_out.items()):
        print(f"left out, {cause}: {count}")
    return 0


def _otlp_json(options: argparse.Namespace) -> str:
    from monologue.traces.otlp import to_json

    counts = to_json(options.folder, options.out)
    torn = f", {counts.torn} torn lines left out" if counts.torn else ""
    spaced = f", {counts.reformatted} lines reformatted" if counts.reformatted else ""
    return f"{counts.episodes} episodes, {counts.records} records, {counts.pictures} pictures written to {options.out}{torn}{spaced}"


def _otlp(options: argparse.Namespace) -> str:
    from monologue.traces.collector import send

    return f"{send(options.folder, options.endpoint, options.protocol or 'http', options.project)} spans sent to {options.endpoint}"


def _phoenix(options: argparse.Namespace) -> str:
    from monologue.traces.phoenix import to_phoenix

    spans, notes = to_phoenix(options.folder, options.endpoint, options.project)
    return f"{spans} spans and {notes} annotations sent to {options.endpoint}, project {options.project}"


def _inspect(options: argparse.Namespace) -> str:
    from monologue.traces.inspect_log import to_inspect

    return f"{to_inspect(options.folder, options.out)} samples written to {options.out}; look: inspect view --log-dir {options.out.parent}"


def import_run(options: argparse.Namespace) -> int:
    """The run that an export holds."""
    from monologue.traces.otlp import from_json

    counts = from_json(options.file, options.out)
    print(f"{counts.episodes} episodes, {counts.records} records, {counts.pictures} pictures read into {options.out}")
    return 0


@contextmanager
def listeners(out: Path, shown: Listener | None, options: argparse.Namespace) -> Iterator[Listener | None]:
    """Who is told of each record: the terminal, a collector, both or nobody. What the collector missed is told at the end."""
    if options.otlp is None:
        yield shown
        return
    from monologue.traces.collector import Forwarder

    forwarder = Forwarder(out, options.otlp, options.protocol or "http", options.project)
    try:
        yield _both(forwarder, shown) if shown else forwarder
    finally:
        print(f"monologue: {forwarder.close()}", file=sys.stderr)


def _both(*told: Listener) -> Listener:
    def tell(record: Record) -> None:
        for listener in told:
            listener(record)

    return tell


def add_collector(command: argparse.ArgumentParser) -> None:
    """The options of whatever sends spans."""
    command.add_argument("--protocol", choices=PROTOCOLS, help="of the collector (default: http)")
    command.add_argument("--project", default="monologue", metavar="NAME", help="Phoenix project that the spans go to")
