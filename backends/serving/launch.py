"""Starts SGLang servers and stops them: the right flags, an environment that works on a machine without a GPU, and no orphan processes.

A server is a process group of three or more; it is told to end as a group, and killed where it does not listen. It runs in a Python of its
own (``python=``), since SGLang pins its torch and transformers exactly. On a CPU it needs the stand-ins of ``cpu/``, which must never be on
the path of a server with a GPU, where they would hide the real kernels.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

from monologue.backends.base import BackendUnavailable
from monologue.backends.places import fingerprint

STANDINS = Path(__file__).parent / "cpu"
ON_CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
FLAGS = ("--skip-server-warmup", "--disable-fast-image-processor")
"""On every device. Pictures become patches by the trainer's arithmetic; the fast processor's is off by a shade."""
ON_ANY = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *(
        "--sleep-on-idle",
        "--mm-attention-backend",
        "sdpa",
        "--mem-fraction-static",
        "0.1",
        "--max-total-tokens",
        "32768",
        "--max-running-requests",
        "64",
    ),
)
NOTHING: Mapping[str, str] = MappingProxyType({})
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Server:
    """A running server; a context manager that ends it."""

    url: str
    """Where it listens."""
    process: subprocess.Popen[bytes]
    """Leader of its process group."""
    log: Path
    """What it says."""

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, seconds: float = 15.0) -> None:
        """SIGTERM to the whole group, SIGKILL to what is left of it."""
        for told in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, told)
                self.process.wait(seconds)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue

    def kill(self) -> None:
        """SIGKILL to the whole group, as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def command(
    model: str, port: int, *, python: str = sys.executable, device: str = "cuda", dtype: str = "", flags: Sequence[str] = ()
) -> list[str]:
    """The command line of a server, which names its weights by their content. ``flags`` come last, so they win."""
    base = [python, "-m", "sglang.launch_server", "--model-path", model, "--host", "127.0.0.1", "--port", str(port)]
    base += ["--weight-version", fingerprint(model), "--nccl-port", str(free_port())]
    own = ["--dtype", dtype or ("float32" if device == "cpu" else "bfloat16"), *FLAGS]
    return [*base, *own, *(CPU_FLAGS if device == "cpu" else ()), *flags]


def lora_flags(rank: int, device: str = "cuda") -> list[str]:
    """Flags of a server that takes adapters of every linear layer up to this rank; they cannot be changed once it runs."""
    backend = ["--lora-backend", "torch_native"] if device == "cpu" else []
    return ["--enable-lora", "--max-lora-rank", str(rank), "--lora-target-modules", *LORA_MODULES, *backend]


def environment(device: str, extra: Mapping[str, str] = NOTHING) -> dict[str, str]:
    """This process's environment and what the server needs beside. A path in ``extra`` is put before those that are there."""
    own = {**os.environ, **ON_ANY} if device != "cpu" else {**os.environ, **ON_ANY, **ON_CPU, "PYTHONPATH": str(STANDINS)}
    paths = [found for found in (extra.get("PYTHONPATH"), own.get("PYTHONPATH")) if found]
    return {**own, **extra, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def free_port() -> int:
    """A port that nobody listens on, below those that systems deal out by themselves: a server takes it seconds later."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise BackendUnavailable("no free port was found between 20000 and 32000")


def launch(
    model: str,
    *,
    port: int | None = None,
    python: str = sys.executable,
    device: str = "cuda",
    dtype: str = "",
    flags: Sequence[str] = (),
    extra: Mapping[str, str] = NOTHING,
    log: Path,
    wait: float = 600.0,
) -> Server:
    """Starts a server, with ``extra`` in its environment, and waits until it answers. Raises BackendUnavailable with the end of its log
    where it does not.
    """
    port = port or free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command(model, port, python=python, device=device, dtype=dtype, flags=flags),
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(device, extra),
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _await(server, wait)
    except BaseException:
        server.stop()
        raise
    return server


def _await(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not server.alive():
            raise BackendUnavailable(f"the server ended with exit code {server.process.returncode} before it answered:\n{tail(server.log)}")
        if ready(server.url):
            return
        time.sleep(0.3)
    raise BackendUnavailable(f"the server did not answer within {seconds:.0f} s:\n{tail(server.log)}")


def ready(url: str) -> bool:
    """Whether the server tells its model."""
    try:
        with urllib.request.urlopen(f"{url}/model_info", timeout=5) as answer:
            return "model_path" in json.load(answer)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log, long lines cut."""
    return "\n".join(line[:300] for line in log.read_text(errors="replace").splitlines()[-lines:])
