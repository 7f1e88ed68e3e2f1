"""``monologue serve``: real SGLang servers for the policies, kept until Ctrl-C."""

from __future__ import annotations

import argparse
import time

from monologue.usage import UsageError


def serve(options: argparse.Namespace) -> int:
    """Starts SGLang servers for the policies and keeps them until Ctrl-C."""
    from contextlib import ExitStack

    from monologue.backends.serving.launch import launch
    from monologue.seating import starter

    wanted = {role: getattr(options, role) for role in ("questioner", "answerer") if getattr(options, role) != "none"}
    if not wanted:
        raise UsageError("nothing to serve: both --questioner and --answerer are 'none'")
    with ExitStack() as running:
        urls = {}
        for number, (role, model) in enumerate(wanted.items()):
            source = str(starter(role)) if model == "starter" else model
            print(f"starting {role} ({source}) ...", flush=True)
            server = launch(
                source,
                port=options.port + number if options.port else None,
                python=options.python,
                device=options.device,
                dtype=options.dtype,
                flags=options.flag,
                log=options.logs / f"{role}.log",
                wait=options.wait,
            )
            running.enter_context(server)
            urls[role] = server.url
            print(f"{role}: {server.url}  (log: {server.log})", flush=True)
        print("play: monologue play --backend sglang " + " ".join(f"--{role} {url}" for role, url in urls.items()), flush=True)
        print("Ctrl-C stops them", flush=True)
        wait_for_interrupt()
    return 0


def wait_for_interrupt() -> None:
    """Returns at Ctrl-C."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
