"""``monologue serve``: real SGLang servers for the policies, kept until Ctrl-C.

Several replicas of a role share its episodes; several GPUs are dealt out to the servers in turn. ``--tiny`` serves the shipped policies on
this machine's CPU with the SGLang that ``tests_real/install_sglang.sh`` installs, so that everything around a server can be tried anywhere.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

from monologue.usage import UsageError

TINY_PYTHON = Path(".venv-sglang/bin/python")


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
        print("play: monologue play --backend sglang " + " ".join(f"--{role} {','.join(each)}" for role, each in urls.items()), flush=True)
        print("Ctrl-C stops them", flush=True)
        wait_for_interrupt()
    return 0


def settle(options: argparse.Namespace) -> None:
    """Fills in what depends on other options. Raises UsageError."""
    if options.tiny:
        if options.device == "cuda" or options.gpus:
            raise UsageError("--tiny serves on the CPU and takes neither --device cuda nor --gpus")
        if any(getattr(options, role) not in ("starter", "none") for role in ("questioner", "answerer")):
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
    from monologue.seating import starter

    wanted = {role: getattr(options, role) for role in ("questioner", "answerer") if getattr(options, role) != "none"}
    if not wanted:
        raise UsageError("nothing to serve: both --questioner and --answerer are 'none'")
    adapters = lora_flags(options.lora_rank, options.device) if options.lora_rank else []
    gpus = cycle(options.gpus.split(",") if options.gpus else [""])
    found = list[tuple[str, dict[str, Any]]]()
    for role, model in wanted.items():
        for replica in range(options.replicas):
            gpu = next(gpus)
            order = {
                "model": str(starter(role)) if model == "starter" else model,
                "port": options.port + len(found) if options.port else None,
                "python": options.python,
                "device": options.device,
                "dtype": options.dtype,
                "flags": [*adapters, *(["--base-gpu-id", gpu] if gpu else []), *options.flag],
                "log": options.logs / f"{role}-{replica}.log",
                "wait": options.wait,
            }
            found.append((role, order))
    return found


def wait_for_interrupt() -> None:
    """Returns at Ctrl-C, or when the process is told to end."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
