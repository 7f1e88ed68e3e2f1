"""From the names on the command line to policies in their seats.

``--backend scripted`` lets the problem's own program speak through the scripted engine, without any model. With ``transformers``,
``starter`` means the checkpoint that ships for that seat and graph: the pair for a dialogue, the one-shot rival for ``direct``;
``oracle`` plays the problem's program in that checkpoint's own tokens; anything else is a folder or a Hub name. One engine is loaded
per checkpoint, however many seats it takes. An address is a policy on SGLang servers; several, with commas, share its episodes.
``chat:PROVIDER:MODEL`` is a hosted chat model, by LangChain's names.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from monologue.agents.codec import CodecError
from monologue.agents.load import check_role, codec_for, load_policy
from monologue.agents.policy import Policy, close
from monologue.backends.base import Sampling
from monologue.backends.garbage import settled
from monologue.backends.places import HABIT, STARTERS, place, portable, short
from monologue.graphs.crew import Crew
from monologue.graphs.oracle import Seat, oracle, scripted
from monologue.graphs.play import play
from monologue.graphs.registry import find
from monologue.graphs.summary import Summary
from monologue.tasks.base import Problem
from monologue.usage import UsageError
from monologue.version import __version__


def starter(role: str, graph: str = "monologue", task: str = "shapes") -> Path:
    """The shipped checkpoint of a seat. ``direct`` has a rival of its own; in the world of hops one policy speaks in every seat, and the
    thinker was taught by it.
    """
    if task == "hops" or role == "thinker":
        return STARTERS / ("thinker" if role == "thinker" else "speaker")
    return STARTERS / ("direct" if graph == "direct" and role == "answerer" else role)


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they stand in run.json, with the command and the version."""
    how = ("concurrency", "deadline", "retries", "processes", "otlp", "protocol", "project")
    left_out = ("run", "out", "verb", "json", "live", "no_resume", "n", "samples", *how)
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key not in left_out}
    if getattr(options, "capture", "all") == "shape" and options.image is not None:
        plain |= {"image": None, "question": None, "choices": None}
        return {**plain, "command": "monologue play (its problem was not captured)", "version": __version__}
    return {**plain, "command": "monologue " + " ".join(sys.argv[1:]), "version": __version__}


def habit_of(source: str) -> Any:
    """How a checkpoint was taught to think. Raises BackendError where it was not."""
    from monologue.backends.latent import Habit

    return Habit.load(place(source))


def check_speaks(source: str, role: str) -> None:
    """Raises UsageError for a checkpoint that was taught to think, in a seat where nobody does: its answers would be others."""
    if role == "thinker" or not os.path.isfile(Path(place(source)) / HABIT) or not habit_of(source).steps:
        return
    told = f"{source!r} was taught to answer after latent steps ({HABIT}), and the seat {role!r} takes none"
    raise UsageError(
        f"{told}; seat it by play --graph latent:percent=0 --thinker {source} or serve --thinker, or see what it says without by "
        "'monologue eval latent --controls'"
    )


@contextmanager
def seats(graph: str, options: argparse.Namespace) -> Iterator[Mapping[str, Seat]]:
    """Policies for the graph's roles, closed at the end."""
    loaded: dict[str, Policy] = {}
    try:
        yield _seated(graph, options, loaded)
    finally:
        asyncio.run(close(loaded.values()))


def seated(graph: str, options: argparse.Namespace) -> Mapping[str, Seat]:
    """Policies for the graph's roles, for whoever closes them."""
    return _seated(graph, options, {})


def _seated(graph: str, options: argparse.Namespace, loaded: dict[str, Policy]) -> Mapping[str, Seat]:
    try:
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.backend == "scripted":
        return {role: _scripted(role, options) for role in find(graph).roles}
    taken: dict[str, Seat] = {}
    for role in find(graph).roles:
        wanted = getattr(options, role)
        if role == "thinker" and wanted.startswith("chat:"):
            raise UsageError(
                f"a hosted model takes no latent steps: --thinker is a folder that 'train latent' wrote, or a server, got {wanted!r}"
            )
        if wanted.startswith("chat:"):
            taken[role] = _hosted(wanted, role, sampling)
            continue
        if options.backend == "sglang" or wanted.startswith(("http://", "https://")):
            taken[role] = loaded[wanted] = policy = _addressed(wanted, role, sampling)
            if role == "thinker" and not policy.backend.facts.extra.get("habit"):
                raise UsageError(f"the server at {wanted} takes no latent steps; start one with 'monologue serve --thinker FOLDER'")
            continue
        source = portable(starter(role, graph, getattr(options, "task", "shapes")) if wanted in ("starter", "oracle") else wanted)
        check_speaks(source, role)
        thinks = role == "thinker"
        key = f"{source} thinking" if thinks else source
        if key not in loaded:
            taken_names = {policy.policy_id for policy in loaded.values()}
            more = {"habit": habit_of(source)} if thinks else {}
            named = source if short(source) in taken_names and not thinks else ""
            loaded[key] = load_policy(source, role, sampling=sampling, policy_id=named, **more)
        policy = loaded[key]
        check_role(policy.backend, role)
        taken[role] = _oracle(policy, role) if wanted == "oracle" else policy
    return taken


@contextmanager
def player(graph: str, options: argparse.Namespace) -> Iterator[Callable[..., Summary]]:
    """``play(problems, run, **options)`` with the policies in their seats, in this process or in ``--processes`` of them."""
    if options.processes == 1:
        with seats(graph, options) as taken, settled():
            yield partial(_play, graph, taken)
        return
    with Crew(partial(seated, graph, options), options.processes) as crew:
        yield partial(crew.play, graph)


def _play(graph: str, taken: Mapping[str, Seat], problems: Sequence[Problem], run: Path, **more: Any) -> Summary:
    if problems[0].task == "own":
        check_sayable(problems[0], taken)
    return play(graph, problems, taken, run, **more)


def _scripted(role: str, options: argparse.Namespace) -> Seat:
    if getattr(options, role) not in ("starter", "oracle"):
        raise UsageError(f"--backend scripted plays the problem's own program and takes no --{role}, got {getattr(options, role)!r}")
    return scripted(f"scripted-{role}")


def _addressed(endpoints: str, role: str, sampling: Sampling) -> Policy:
    if not endpoints.startswith(("http://", "https://")):
        raise UsageError(f"--backend sglang takes the servers' addresses, --{role} http://HOST:PORT[,http://...], got {endpoints!r}")
    return served(endpoints, role, sampling)


def served(endpoints: str, role: str, sampling: Sampling, policy_id: str = "", source: str | None = None) -> Policy:
    """A policy on SGLang servers, named by their addresses with commas between them; ``source`` is the checkpoint that it began with
    (default: what the servers name now). Raises BackendError, CodecError.
    """
    from monologue.agents.load import seat
    from monologue.backends.sglang import SGLangBackend

    engine = SGLangBackend(*endpoints.split(","), source=source)
    return seat(engine, role, sampling, policy_id or f"{role}-{Path(engine.facts.model).name}")


def _hosted(named: str, role: str, sampling: Sampling) -> Policy:
    """A chat model by LangChain's names, sampled as the command says."""
    from monologue.agents.hosted import hosted

    settings: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    if sampling.top_p < 1:
        settings["top_p"] = sampling.top_p
    name = named.removeprefix("chat:")
    chat = chat_model(name, f"--{role} chat:", **settings)
    return hosted(chat, policy_id=f"{role}-{name.partition(':')[2]}")


def chat_model(named: str, place: str = "judge = ", **settings: Any) -> Any:
    """A hosted model by LangChain's names, PROVIDER:MODEL; ``place`` is where it was named. Raises UsageError."""
    provider, _, model = named.partition(":")
    if not provider or not model:
        raise UsageError(f"a hosted model is named {place}PROVIDER:MODEL, e.g. {place}openai:gpt-5-mini, got {named!r}")
    try:
        from langchain.chat_models import init_chat_model
    except ModuleNotFoundError as error:
        raise UsageError(f"{named!r} needs LangChain's model classes; pip install 'monologue[chat]'") from error
    try:
        return init_chat_model(model, model_provider=provider, **settings)
    except Exception as error:  # each provider has its own: a package that is missing, a key that is not set
        raise UsageError(f"LangChain cannot open {named!r}: {str(error)[:300]}") from error


def _oracle(policy: Policy, role: str) -> Seat:
    """The oracle, speaking the language of the policy that is to learn from it."""
    engine: Any = policy.backend
    if not hasattr(engine, "tokenizer"):
        raise CodecError(f"the oracle needs a tokenizer to speak with, but {engine.facts.model!r} carries none")
    eyes = engine if engine.facts.sees else None
    return oracle(codec_for(engine.tokenizer, eyes), eyes, f"oracle-{role}")


def check_sayable(problem: Problem, taken: Mapping[str, Seat]) -> None:
    """An own problem in the words and pictures of those who will play it. Raises CodecError, BackendError before anything is written."""
    from monologue.agents.messages import Message

    for role, seated in taken.items():
        if not isinstance(seated, Policy):
            continue
        seated.codec.open([Message("user", problem.question, choices=problem.choices)])
        if role == "answerer":
            engine: Any = seated.backend
            for picture in problem.pictures:
                engine.placeholders(picture())
