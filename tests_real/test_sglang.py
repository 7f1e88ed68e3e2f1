"""The client against the real server: parity with the in-process engine, traces that replay, refusals, weights, kills, aborts."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from monologue.agents.load import load_policy, seat
from monologue.backends.base import BackendError, BackendTimeout, Picture, Prompt, RequestRefused, Sampling
from monologue.backends.hf import HFBackend
from monologue.backends.serving.launch import Server, launch
from monologue.backends.sglang import SGLangBackend
from monologue.cli import main
from monologue.graphs.play import aplay
from monologue.proof import verify
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
EOS = 2
GREEDY = Sampling(temperature=0.0, max_tokens=16, stop_ids=(EOS,))


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """The Python in which SGLang is installed."""
    assert PYTHON.is_file(), "SGLang is not installed; run tests_real/install_sglang.sh (make test-sglang does)"
    return str(PYTHON)


@pytest.fixture(scope="session")
def servers(sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A real SGLang server for each starter policy."""
    logs, started = tmp_path_factory.mktemp("logs"), dict[str, Server]()
    try:
        for role in ("questioner", "answerer"):
            started[role] = launch(str(starter(role)), python=sglang_python, device="cpu", log=logs / f"{role}.log")
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture
async def engines(servers: dict[str, Server]) -> AsyncIterator[dict[str, tuple[SGLangBackend, HFBackend]]]:
    found = {role: (SGLangBackend(server.url), HFBackend(starter(role))) for role, server in servers.items()}
    yield found
    for served, own in found.values():
        await served.aclose()
        await own.aclose()


def prompts(role: str, n: int, folder: Path) -> list[Prompt]:
    """Prompts as they stand in dialogues of the oracle."""
    reader = RunReader(folder)
    calls = [call for episode in reader.episodes() for call in episode.calls() if call.role == role]
    found = [
        Prompt(call.prompt_ids, tuple(Picture(image.sha256, reader.picture(image.sha256)) for image in call.images), call.episode_id)
        for call in calls
    ]
    return found[:n]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the oracle."""
    run = tmp_path_factory.mktemp("parity") / "run"
    words = ["play", "--questioner", "oracle", "--answerer", "oracle", "--split", "validation", "--n", "250", "--out", str(run)]
    assert main(words) == 0
    return run


@pytest.mark.parametrize("role", ["questioner", "answerer"])
async def test_greedy_tokens_and_log_probs_equal_those_in_process(
    engines: dict[str, tuple[SGLangBackend, HFBackend]], folder: Path, role: str
) -> None:
    served, own = engines[role]
    asked = prompts(role, 250, folder)
    assert len(asked) == 250
    theirs = await asyncio.gather(*(served.generate(prompt, GREEDY) for prompt in asked))
    ours = await asyncio.gather(*(own.generate(prompt, GREEDY) for prompt in asked))
    assert [one.ids for one in theirs] == [one.ids for one in ours]
    assert [one.finish_reason for one in theirs] == [one.finish_reason for one in ours]
    assert [one.images for one in theirs] == [one.images for one in ours]
    gaps = [abs(a - b) for x, y in zip(theirs, ours, strict=True) for a, b in zip(x.logprobs or (), y.logprobs or (), strict=True)]
    assert max(gaps) < 1e-4


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.5), Sampling(temperature=2.0, top_p=0.9), Sampling(temperature=2.0, top_k=5), Sampling(temperature=0.0)],
)
async def test_traces_sampled_by_the_server_replay_in_process(servers: dict[str, Server], tmp_path: Path, sampling: Sampling) -> None:
    engines = {role: SGLangBackend(server.url) for role, server in servers.items()}
    seats = {role: seat(engine, role, sampling, role) for role, engine in engines.items()}
    summary = await aplay("monologue", Shapes().problems("validation", 16), seats, tmp_path / "run", progress=False)
    for engine in engines.values():
        await engine.aclose()
    assert not summary.failed
    checks = await asyncio.to_thread(verify, tmp_path / "run")
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    assert {"replay questioner", "replay answerer"} <= {check.name for check in checks}
    calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
    assert {call.engine for call in calls} == {"sglang"} and all(call.sampling["seed"] is None for call in calls)


async def test_later_turns_come_from_the_cache(servers: dict[str, Server], tmp_path: Path) -> None:
    engines = {role: SGLangBackend(server.url) for role, server in servers.items()}
    seats = {role: seat(engine, role, Sampling(temperature=0.0), role) for role, engine in engines.items()}
    await aplay("monologue", Shapes().problems("validation", 12), seats, tmp_path / "run", progress=False, concurrency=4)
    for engine in engines.values():
        await engine.aclose()
    later = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls() if call.turn > 0]
    assert sum(call.cached_tokens or 0 for call in later) >= 0.8 * sum(call.prefix_length or 0 for call in later)


async def test_scores_equal_those_in_process(engines: dict[str, tuple[SGLangBackend, HFBackend]], folder: Path) -> None:
    served, own = engines["answerer"]
    for prompt in prompts("answerer", 250, folder)[:20]:
        ids = (20, 21, EOS)
        mine, theirs = await own.score(prompt, ids, Sampling()), await served.score(prompt, ids, Sampling())
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-4
    with pytest.raises(RequestRefused, match="replay in process"):
        await served.score(prompt, ids, Sampling(temperature=0.5))


async def test_what_would_kill_or_hang_the_server_is_refused_before_it_is_sent(
    servers: dict[str, Server], engines: dict[str, tuple[SGLangBackend, HFBackend]], folder: Path
) -> None:
    served, _ = engines["answerer"]
    good = prompts("answerer", 250, folder)[0]
    pad = served.image_token_id
    assert pad is not None
    bad = {
        "ids from 0 to": Prompt((1, 10**6)),
        "ids from 0": Prompt((1, -4)),
        "at least one prompt id": Prompt(()),
        "image placeholders": replace(good, ids=(*good.ids, pad)),
        "for 2 pictures": replace(good, pictures=good.pictures * 2),
        "for 0 pictures": replace(good, pictures=()),
        "within": Prompt((5,) * 600),
    }
    for word, prompt in bad.items():
        with pytest.raises(RequestRefused, match=word):
            await served.generate(prompt, GREEDY)
    huge = replace(GREEDY, temperature=1.0, top_p=0.5, top_k=10**6)
    with pytest.raises(RequestRefused, match="top_k"):
        await served.generate(good, huge)
    assert servers["answerer"].alive() and (await served.generate(good, GREEDY)).ids


async def test_placeholders_are_never_sampled(engines: dict[str, tuple[SGLangBackend, HFBackend]], folder: Path) -> None:
    served, _ = engines["answerer"]
    hot = Sampling(temperature=50.0, max_tokens=60)
    found = await asyncio.gather(*(served.generate(prompt, hot) for prompt in prompts("answerer", 250, folder)[:30]))
    assert not {token for one in found for token in one.ids} & set(served.facts.extra["banned_ids"])


async def test_a_cancelled_call_frees_its_place_on_the_server(servers: dict[str, Server], folder: Path) -> None:
    served = SGLangBackend(servers["questioner"].url)
    long = Sampling(temperature=1.0, max_tokens=400)
    prompt = prompts("questioner", 250, folder)[0]
    calls = [asyncio.ensure_future(served.generate(prompt, long)) for _ in range(4)]
    await asyncio.sleep(0.5)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    for _ in range(50):
        if running(servers["questioner"].url) == 0:
            break
        await asyncio.sleep(0.2)
    assert running(servers["questioner"].url) == 0
    assert (await served.generate(prompt, GREEDY)).ids
    await served.aclose()


def running(url: str) -> int:
    with urllib.request.urlopen(f"{url}/v1/loads", timeout=5) as answer:
        return sum(int(one["num_running_reqs"]) for one in json.load(answer)["loads"])


async def test_new_weights_are_taken_and_no_later_call_carries_the_old_version(
    servers: dict[str, Server], tmp_path: Path, folder: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(starter("questioner"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.02 for name, value in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    served, own = SGLangBackend(servers["questioner"].url), HFBackend(other)
    asked = prompts("questioner", 250, folder)[:40]
    under_way = [asyncio.ensure_future(served.generate(prompt, GREEDY)) for prompt in asked]
    await served.load(str(other), "step-1")
    late = await asyncio.gather(*(served.generate(prompt, GREEDY) for prompt in asked))
    assert {one.weights_version for one in late} == {"step-1"} == {served.facts.weights_version}
    assert {one.weights_version for one in await asyncio.gather(*under_way)} <= {"base", "step-1"}
    ours = await asyncio.gather(*(own.generate(prompt, GREEDY) for prompt in asked))
    assert [one.ids for one in late] == [one.ids for one in ours]
    with pytest.raises(BackendError):
        await served.load(str(tmp_path / "nowhere"), "step-2")
    await served.load(str(starter("questioner")), "base")
    await served.aclose()
    await own.aclose()


async def test_a_server_that_is_killed_and_restarted_gets_its_weights_back_before_it_works(sglang_python: str, tmp_path: Path) -> None:
    source, log = str(starter("questioner")), tmp_path / "log"
    server = launch(source, python=sglang_python, device="cpu", log=log)
    served = SGLangBackend(server.url, timeout=90.0, attempts=60)
    try:
        await served.load(source, "step-7")
        answerer = load_policy(starter("answerer"), "answerer", sampling=Sampling(temperature=0.0))
        seats = {"questioner": seat(served, "questioner", Sampling(temperature=0.0), "q"), "answerer": answerer}
        problems = Shapes().problems("validation", 40)
        playing = asyncio.ensure_future(aplay("monologue", problems, seats, tmp_path / "run", progress=False, concurrency=8))
        while not any((tmp_path / "run" / "spans").glob("*.jsonl")) or len(list(RunReader(tmp_path / "run").episodes())) < 4:
            await asyncio.sleep(0.1)
        server.kill()
        port = int(server.url.rsplit(":", 1)[1])
        server = await asyncio.to_thread(launch, source, port=port, python=sglang_python, device="cpu", log=log)
        summary = await playing
        assert not summary.failed and served.reloads >= 1
        calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls() if call.role == "questioner"]
        assert {call.weights_version for call in calls} == {"step-7"}
        assert all(check.ok for check in verify_trace(tmp_path / "run"))
    finally:
        await served.aclose()
        server.stop()


def verify_trace(run: Path) -> list[Any]:
    return verify(run, replay=False)


async def test_a_server_that_hangs_or_talks_nonsense_fails_the_call_by_name(tmp_path: Path, folder: Path) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    facts = json.dumps({"model_path": str(starter("questioner")), "max_req_input_len": 506, "weight_version": "default"})
    for manner, error, word in (
        ("hang", BackendTimeout, "deadline"),
        ("garbage", BackendError, "JSON"),
        ("odd", BackendError, "output_ids"),
    ):
        process = await asyncio.create_subprocess_exec("python3", str(fake), manner, facts, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        served = SGLangBackend(f"http://127.0.0.1:{port}", timeout=1.0, attempts=2)
        with pytest.raises(error, match=word):
            await served.generate(Prompt((1, 5)), GREEDY)
        await served.aclose()
        process.kill()
        await process.wait()


FAKE = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
manner, facts = sys.argv[1], sys.argv[2].encode()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(facts)
    def do_POST(self):
        if manner == "hang":
            time.sleep(60)
        self.answer(b"<html>" if manner == "garbage" else b"{}")
    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
