"""From the names on the command line to policies in their seats.

``--backend scripted`` lets the problem's own program speak through the scripted engine, without any model. With ``transformers``,
``starter`` means the checkpoint that ships for that seat and graph: the pair for a dialogue, the one-shot rival for ``direct``;
``oracle`` plays the problem's program in that checkpoint's own tokens; anything else is a folder or a Hub name. One engine is loaded
per checkpoint, however many seats it takes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monologue import __version__
from monologue.agents.codec import CodecError
from monologue.agents.load import codec_for, load_policy
from monologue.agents.policy import Policy
from monologue.backends.base import Sampling
from monologue.graphs.oracle import Seat, oracle, scripted
from monologue.graphs.registry import find
from monologue.usage import UsageError


def starter(role: str, graph: str) -> Path:
    """The shipped checkpoint of a seat."""
    from importlib.resources import files

    name = "direct" if graph == "direct" and role == "answerer" else role
    return Path(str(files("monologue.backends"))) / "starter" / name


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they stand in run.json, with the command and the version."""
    left_out = ("run", "out", "verb", "json", "live", "no_resume", "concurrency", "n", "samples", "otlp", "protocol", "project")
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key not in left_out}
    if getattr(options, "capture", "all") == "shape" and options.image is not None:
        plain |= {"image": None, "question": None, "choices": None}
        return {**plain, "command": "monologue play (its problem was not captured)", "version": __version__}
    return {**plain, "command": "monologue " + " ".join(sys.argv[1:]), "version": __version__}


@contextmanager
def seats(graph: str, options: argparse.Namespace) -> Iterator[Mapping[str, Seat]]:
    """Policies for the graph's roles, closed at the end."""
    try:
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.backend == "scripted":
        yield {role: _scripted(role, options) for role in find(graph).roles}
        return
    loaded: dict[str, Policy] = {}
    taken: dict[str, Seat] = {}
    for role in find(graph).roles:
        wanted = getattr(options, role)
        source = str(starter(role, graph)) if wanted in ("starter", "oracle") else wanted
        if source not in loaded:
            name = f"starter-{Path(source).name}" if wanted in ("starter", "oracle") else ""
            loaded[source] = load_policy(source, role, sampling=sampling, policy_id=name)
        policy = loaded[source]
        taken[role] = _oracle(policy, role) if wanted == "oracle" else policy
    try:
        yield taken
    finally:
        asyncio.run(_close(loaded))


def _scripted(role: str, options: argparse.Namespace) -> Seat:
    if getattr(options, role) not in ("starter", "oracle"):
        raise UsageError(f"--backend scripted plays the problem's own program and takes no --{role}, got {getattr(options, role)!r}")
    return scripted(f"scripted-{role}")


def _oracle(policy: Policy, role: str) -> Seat:
    """The oracle, speaking the language of the policy that is to learn from it."""
    engine: Any = policy.backend
    if not hasattr(engine, "tokenizer"):
        raise CodecError(f"the oracle needs a tokenizer to speak with, but {engine.facts.model!r} carries none")
    eyes = engine if engine.facts.sees else None
    return oracle(codec_for(engine.tokenizer, eyes), eyes, f"oracle-{role}")


async def _close(loaded: Mapping[str, Policy]) -> None:
    for policy in loaded.values():
        await policy.backend.aclose()
