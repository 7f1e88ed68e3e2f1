"""``monologue serve``: real SGLang servers for the policies, kept until Ctrl-C.

Several replicas of a role share its episodes; several GPUs are dealt out to the servers in turn. ``--tiny`` serves the shipped policies on
this machine's CPU with the SGLang that ``tests_real/install_sglang.sh`` installs, so that everything around a server can be tried anywhere.
A thinker's server takes latent steps by itself (``backends/serving/latent.py``).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

from monologue.usage import UsageError

TINY_PYTHON = Path(".venv-sglang/bin/python")
ROLES = ("questioner", "answerer", "thinker")
ROOM = 1024
"""Most places that the pictures before a served thinker have."""


def serve(options: argparse.Namespace) -> int:
    """Starts SGLang servers for the policies and keeps them until Ctrl-C."""
    from monologue.backends.serving.launch import launch

    settle(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    orders = orders_of(options)
    with ExitStack() as running, ThreadPoolExecutor(len(orders)) as pool:
        urls: dict[str, list[str]] = {}
        print(f"starting {len(orders)} servers, logs in {options.logs} ...", flush=True)
        for (role, _), server in zip(orders, pool.map(lambda order: running.enter_context(launch(**order[1])), orders), strict=True):
            urls.setdefault(role, []).append(server.url)
            print(f"{role}: {server.url}  (log: {server.log})", flush=True)
        print(f"play: {play_command(urls, 'hops' if options.thinker == 'starter' else '')}", flush=True)
        print("Ctrl-C stops them", flush=True)
        wait_for_interrupt()
    return 0


def play_command(urls: Mapping[str, Sequence[str]], task: str = "") -> str:
    """What plays on the servers, a task whose world a thinker knows; seats beside it that none of them holds are in that process."""
    seats = " ".join(f"--{role} {','.join(each)}" for role, each in urls.items())
    if "thinker" in urls:
        return f"monologue play {f'--task {task} ' * bool(task)}--graph latent {seats}"
    return f"monologue play --backend sglang {seats}"


def settle(options: argparse.Namespace) -> None:
    """Fills in what depends on other options. Raises UsageError."""
    if options.tiny:
        if options.device == "cuda" or options.gpus:
            raise UsageError("--tiny serves on the CPU and takes neither --device cuda nor --gpus")
        if any(getattr(options, role) not in ("starter", "none") for role in ROLES):
            raise UsageError("--tiny serves the starter policies; leave it out to serve others")
        options.device = "cpu"
    options.device = options.device or "cuda"
    if options.gpus and options.device == "cpu":
        raise UsageError("--gpus belongs to --device cuda")
    if options.python is None:
        options.python = str(TINY_PYTHON) if options.device == "cpu" and TINY_PYTHON.is_file() else sys.executable
    for name in ("replicas", "lora_rank"):
        if getattr(options, name) < (name == "replicas"):
            raise UsageError(f"expected --{name.replace('_', '-')} of {int(name == 'replicas')} or more, got {getattr(options, name)!r}")


def orders_of(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Role and ``launch`` arguments of every server."""
    from monologue.backends.serving.launch import lora_flags
    from monologue.seating import check_speaks, starter

    wanted = {role: getattr(options, role) for role in ROLES if getattr(options, role) != "none"}
    if not wanted:
        raise UsageError("nothing to serve: --questioner, --answerer and --thinker are all 'none'")
    adapters = lora_flags(options.lora_rank, options.device) if options.lora_rank else []
    gpus = cycle(options.gpus.split(",") if options.gpus else [""])
    found = list[tuple[str, dict[str, Any]]]()
    for role, named in wanted.items():
        model = str(starter(role)) if named == "starter" else named
        check_speaks(model, role)
        own, environment = _thinking(model) if role == "thinker" else ((), {})
        for replica in range(options.replicas):
            gpu = next(gpus)
            order = {
                "model": model,
                "port": options.port + len(found) if options.port else None,
                "python": options.python,
                "device": options.device,
                "dtype": options.dtype,
                "flags": [*own, *adapters, *(["--base-gpu-id", gpu] if gpu else []), *options.flag],
                "extra": environment,
                "log": options.logs / f"{role}-{replica}.log",
                "wait": options.wait,
            }
            found.append((role, order))
    return found


def _thinking(model: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Flags and environment of a server that thinks as its checkpoint was taught. Raises UsageError, BackendError."""
    from monologue.agents.codec import CodecError
    from monologue.agents.load import codec_for
    from monologue.backends.checkpoints import open_config, open_processors
    from monologue.backends.inputs import Eyes
    from monologue.backends.serving.latent import Thinking, environment
    from monologue.seating import habit_of

    config = open_config(model)
    tokenizer, processor = open_processors(model, config)
    eyes: Any = Eyes(config, processor, model)
    try:
        thinking = Thinking.of(habit_of(model), config, codec_for(tokenizer, eyes).ending, ROOM)
        return thinking.flags(config), environment(config)
    except CodecError as error:
        told = "serve it by monologue.backends.serving.latent with ids of your own in `after`"
        raise UsageError(f"{model!r} cannot be served as a thinker: {error}; {told}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def wait_for_interrupt() -> None:
    """Returns at Ctrl-C, or when the process is told to end."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
