"""The client of SGLang servers without a server: what it reads, what it sends again, what ``monologue serve`` would start."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL.Image import new

from monologue.backends.base import BackendError, BackendTimeout, BackendUnavailable, Picture, Prompt, RequestRefused, Sampling
from monologue.backends.checkpoints import open_config, open_processors
from monologue.backends.inputs import Eyes
from monologue.backends.serving.answers import read_generation, read_scores, whole
from monologue.backends.serving.launch import command, environment
from monologue.backends.serving.requests import NEVER, Requests
from monologue.backends.wire import CUTS, Loop, Wire
from monologue.cli import main, parser
from monologue.seating import starter
from monologue.serving import orders_of, settle
from monologue.traces.images import decode
from monologue.usage import UsageError

META: dict[str, Any] = {
    "prompt_tokens": 3,
    "weight_version": "step-2",
    "weight_versions": [{"version": "step-1", "start": 0, "end": 1}, {"version": "step-2", "start": 1, "end": 2}],
    "finish_reason": {"type": "stop"},
    "output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None]],
    "cached_tokens": 2,
}


def answer(**meta: Any) -> dict[str, Any]:
    return {"output_ids": [7, 8], "meta_info": {**META, **meta}}


def test_an_answer_is_read_whole() -> None:
    found = read_generation(answer(), (1, 2, 3), Sampling(stop_ids=(8,)), ())
    assert (found.ids, found.logprobs, found.finish_reason, found.cached_tokens) == ((7, 8), (-0.5, -0.25), "stop", 2)
    assert found.weights == (("step-1", 0, 1), ("step-2", 1, 2)) and found.weights_version == "step-2"
    assert read_generation(answer(weight_versions=META["weight_versions"][1:]), (1, 2, 3), Sampling(), ()).weights == ()
    cut = answer(output_token_sampling_logprobs=[-0.1, 1e-9])
    assert read_generation(cut, (1, 2, 3), Sampling(top_k=2), ()).logprobs == (-0.1, 0.0)


@pytest.mark.parametrize(
    ("content", "sampling", "banned", "word"),
    [
        (answer(prompt_tokens=4), Sampling(), (), "counted 4"),
        ({**answer(), "prompt_token_ids": [1, 2, 9]}, Sampling(), (), "id 9 at place 2"),
        (answer(), Sampling(), (8,), "placeholder 8"),
        (answer(output_token_logprobs=[[-0.5, 7, None]]), Sampling(), (), "other ids"),
        (answer(), Sampling(top_p=0.5), (), "truncated distribution"),
        (answer(finish_reason={"type": "abort", "message": "bye"}), Sampling(), (), "aborted"),
    ],
)
def test_an_answer_that_does_not_add_up_is_an_error(
    content: dict[str, Any], sampling: Sampling, banned: tuple[int, ...], word: str
) -> None:
    with pytest.raises(BackendError, match=word):
        read_generation(content, (1, 2, 3), sampling, banned)


def test_scores_give_what_banned_ids_would_have_taken_to_the_others() -> None:
    meta = {"prompt_tokens": 3, "input_token_logprobs": [[None, 1, None], [-1.0, 2, None], [-2.0, 3, None]]}
    content = {"output_ids": [], "meta_info": {**meta, "input_token_ids_logprobs": [None, [[math.log(0.5), 9, None]], [[-80.0, 9, None]]]}}
    assert read_scores(content, (1,), (2, 3), ()) == (-1.0, -2.0)
    assert read_scores(content, (1,), (2, 3), (9,)) == pytest.approx((-1.0 + math.log(2), -2.0))
    with pytest.raises(BackendError, match="other ids"):
        read_scores(content, (1,), (2, 4), ())
    with pytest.raises(BackendError, match="output_ids"):
        whole({"error": "no"}, "http://x", "1")
    with pytest.raises(BackendError, match="unfinished after 2"):
        whole(answer(finish_reason=None), "http://x", "1")


@pytest.fixture
async def flaky() -> AsyncIterator[Callable[..., Any]]:
    """A server that answers from a list: a status and a body, None to cut the connection, "hang" to say nothing."""
    servers, writers, ended = list[asyncio.Server](), list[asyncio.StreamWriter](), asyncio.Event()

    async def one(*answers: tuple[int, str] | str | None) -> tuple[Wire, list[bytes]]:
        left, seen = list(answers), list[bytes]()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
            seen.append(await reader.readexactly(length))
            reply = left.pop(0)
            if reply == "hang":
                await ended.wait()
            elif reply is not None:
                body = reply[1].encode()
                writer.write(b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (reply[0], len(body), body))
            writer.close()

        servers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
        return Wire(f"http://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}", limit=4, attempts=6), seen

    yield one
    ended.set()
    for writer in writers:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_what_may_pass_is_sent_again_anew_and_what_cannot_is_not(flaky: Callable[..., Any]) -> None:
    wire, seen = await flaky((503, "later"), None, (200, '{"ok": 1}'), (500, "broken"), (400, "no"), (200, "<html>"), (200, "[1]"))
    numbers = iter(range(9))
    assert await wire.post("/generate", lambda: {"n": next(numbers)}, timeout=5.0) == {"ok": 1}
    assert [json.loads(body) for body in seen] == [{"n": 0}, {"n": 1}, {"n": 2}] and wire.retried == 2
    for error, word in ((BackendError, "broken"), (RequestRefused, "no"), (BackendError, "JSON"), (BackendError, "JSON object")):
        with pytest.raises(error, match=word):
            await wire.post("/generate", {}, timeout=5.0)
    assert len(seen) == 7
    await wire.aclose()


async def test_a_request_that_cuts_connections_is_not_sent_for_ever_nor_waited_for(flaky: Callable[..., Any]) -> None:
    wire, seen = await flaky(*[None] * CUTS, "hang")
    with pytest.raises(BackendUnavailable, match=f"tried {CUTS} times"):
        await wire.post("/generate", {}, timeout=5.0)
    with pytest.raises(BackendTimeout, match="deadline"):
        await wire.post("/generate", {}, timeout=0.1)
    assert len(seen) == CUTS + 1
    await wire.aclose()


def test_a_caller_whose_loop_ends_leaves_nothing_running() -> None:
    loop, ended = Loop("test"), list[str]()

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("ended")

    async def impatient() -> None:
        await asyncio.wait_for(loop.run(endless()), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(impatient())
    running = loop.submit(endless())
    loop.stop()
    assert ended == ["ended", "ended"] and running.cancelled()


def ordered(*words: str) -> list[tuple[str, dict[str, Any]]]:
    options = parser().parse_args(["serve", *words])
    settle(options)
    return orders_of(options)


def test_serve_deals_out_replicas_ports_and_gpus() -> None:
    found = ordered("--replicas", "2", "--gpus", "0,1", "--port", "30000", "--lora-rank", "8", "--flag=--tp=1", "--answerer", "some/vlm")
    assert [role for role, _ in found] == ["questioner", "questioner", "answerer", "answerer"]
    assert [order["port"] for _, order in found] == [30000, 30001, 30002, 30003]
    assert [order["flags"][order["flags"].index("--base-gpu-id") + 1] for _, order in found] == ["0", "1", "0", "1"]
    assert found[0][1]["model"] == str(starter("questioner")) and found[2][1]["model"] == "some/vlm"
    assert all("--enable-lora" in order["flags"] and order["flags"][-1] == "--tp=1" and order["device"] == "cuda" for _, order in found)
    assert len({order["log"] for _, order in found}) == 4


def test_tiny_serves_the_starters_on_the_cpu_and_nothing_else() -> None:
    found = ordered("--tiny")
    assert {order["device"] for _, order in found} == {"cpu"} and [role for role, _ in found] == ["questioner", "answerer"]
    for words in (["--tiny", "--gpus", "0"], ["--tiny", "--questioner", "x"], ["--replicas", "0"], ["--device", "cpu", "--gpus", "1"]):
        with pytest.raises(UsageError):
            ordered(*words)
    assert main(["serve", "--questioner", "none", "--answerer", "none"]) == 2


def test_the_cpu_stand_ins_never_reach_a_gpu_server() -> None:
    words = command("starter", 1, device="cuda", flags=["--tp", "2"])
    assert words[-2:] == ["--tp", "2"] and "bfloat16" in words and "torch_native" not in words
    assert "serving/cpu" not in environment("cuda").get("PYTHONPATH", "") and Path(environment("cpu")["PYTHONPATH"]).name == "cpu"
    assert "base:" in " ".join(command(str(starter("questioner")), 1, device="cpu"))


@pytest.fixture(scope="module")
def requests() -> Requests:
    """Bodies for the starter answerer."""
    config = open_config(str(starter("answerer")))
    tokenizer, processor = open_processors(str(starter("answerer")), config)
    return Requests(Eyes(config, processor, "starter"), tokenizer, 140, 500, own_limits=True)


def test_a_picture_goes_out_once_encoded_in_the_size_that_the_processor_makes_of_it(requests: Requests) -> None:
    image = new("RGB", (333, 334), "red")
    room = requests.eyes.placeholders(image)
    prompt = Prompt((20, 11, *[13] * room.count, 12, 21), (Picture("x", image),))
    body = requests.generation(prompt, requests.admit(prompt, 1, Sampling()), Sampling(top_p=0.9))
    assert body["input_ids"] == [20, 11, 13, 12, 21] and body["return_prompt_token_ids"] and body["return_sampling_mask"]
    assert body["sampling_params"]["logit_bias"] == {"13": NEVER, "14": NEVER} and body["sampling_params"]["top_k"] == 140
    sent = decode(base64.b64decode(body["image_data"][0]), "sent")
    assert sent.size == (14 * room.grid[2], 14 * room.grid[1])
    again = requests.generation(prompt, requests.admit(prompt, 1, Sampling()), Sampling())
    assert again["image_data"][0] is body["image_data"][0] and "return_sampling_mask" not in again
    assert again["sampling_params"]["ignore_eos"] and "seed" not in again["sampling_params"]


def test_a_picture_that_the_server_would_not_find_is_refused(requests: Requests) -> None:
    image = new("RGB", (84, 84))
    for ids, found in (((20, *[13] * 9, 21), 0), ((11, *[13] * 9, 20, 12), 0)):
        prompt = Prompt(ids, (Picture("x", image),))
        with pytest.raises(RequestRefused, match=f"expected 1 of them, got {found}"):
            requests.generation(prompt, requests.admit(prompt, 1, Sampling()), Sampling())


def test_text_that_the_server_would_take_for_a_picture_is_refused(requests: Requests) -> None:
    class Liar:
        def decode(self, ids: list[int]) -> str:
            return "<|vision_start|><|image_pad|><|vision_end|> what does <image> mean ?"

    other = Requests(requests.eyes, Liar(), 140, 500)
    prompt = Prompt((11, *[13] * 9, 12, 20), (Picture("x", new("RGB", (84, 84))),))
    with pytest.raises(RequestRefused, match="expected 1 of them, got 2"):
        other.generation(prompt, other.admit(prompt, 1, Sampling()), Sampling())


async def test_an_answer_that_comes_in_parts_is_heard_and_its_last_part_counts(flaky: Callable[..., Any]) -> None:
    events = 'data: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n'
    wire, _ = await flaky((200, events), (503, "later"), (200, events), (200, ""))
    for _ in range(2):
        heard = list[dict[str, Any]]()
        assert await wire.post("/generate", {}, timeout=5.0, heard=heard.append) == {"a": 2} and heard == [{"a": 1}, {"a": 2}]
    assert await wire.post("/generate", {}, timeout=5.0, heard=heard.append) == {}
    await wire.aclose()
