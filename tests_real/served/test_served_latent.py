"""Latent steps inside a real server equal those in process: alone, together, in a second turn, and where a thought must be read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monologue.backends.base import Sampling
from monologue.backends.checkpoints import open_checkpoint, open_config
from monologue.backends.perception.ivtlr import Asked, LatentReasoner, Mode, prompts
from monologue.backends.sampling import log_distribution
from monologue.backends.serving.latent import Thinking, environment
from monologue.backends.serving.launch import Server
from tests_real.served.kit import CLOSE, Start, flush, post

THINKING = Thinking(id=139, after=(5,), steps=3)
PLAIN = Sampling(temperature=1.0)
WORDS = 8
PROMPTS = [[1, 40, 55, 60, 5], [1, 33, 44], [1, 90, 91, 92, 93, 94, 95, 5], [5], [1, 50, 5, 66, 67]]
"""The second and the last do not think: no thought follows what has been said since."""
Reply = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def server(start: Start) -> Server:
    config = open_config("starter:questioner")
    return start("questioner", *THINKING.flags(config), extra=environment(config))


@pytest.fixture(scope="module")
def model() -> Any:
    return open_checkpoint("starter:questioner", device="cpu", dtype=torch.float32).model


def sample(server: Server, ids: list[list[int]], temperature: float = 1.0) -> tuple[list[Reply], list[int]]:
    """Ids and log-probs of replies, and how many ids of each prompt came from the cache."""
    settings = {"max_new_tokens": WORDS + THINKING.steps, "temperature": temperature, "ignore_eos": True}
    answers = post(server.url, "/generate", {"input_ids": ids, "sampling_params": settings, "return_logprob": True})
    lines = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    replies = [([pair[1] for pair in line], [pair[0] for pair in line]) for line in lines]
    return replies, [answer["meta_info"]["cached_tokens"] for answer in answers]


@torch.no_grad()
def in_process(model: Any, ids: list[int]) -> list[float]:
    """Log-probs of all ids but the first, a thought's being 0, by reading the sequence place by place with nothing kept."""
    embed, states, given = model.get_input_embeddings(), list[Tensor](), list[Tensor]()
    for token in ids:
        given.append(states[-1] if token == THINKING.id else embed(torch.tensor(token)))
        states.append(model.model(inputs_embeds=torch.stack(given)[None]).last_hidden_state[0, -1])
    table = log_distribution(model.lm_head(torch.stack(states[:-1])), [PLAIN], [THINKING.id])
    return [0.0 if token == THINKING.id else float(line[token]) for token, line in zip(ids[1:], table, strict=True)]


def far(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_prompts_that_think_and_prompts_that_do_not_are_answered_together_as_in_process(server: Server, model: Any) -> None:
    replies, _ = sample(server, PROMPTS)
    for ids, (reply, values) in zip(PROMPTS, replies, strict=True):
        thoughts = THINKING.steps if ids[-1:] == [*THINKING.after] else 0
        assert reply[:thoughts] == [THINKING.id] * thoughts and values[:thoughts] == [0.0] * thoughts
        assert (THINKING.id in reply) == (thoughts > 0 or THINKING.after[0] in reply)
        assert far(values, in_process(model, [*ids, *reply])[len(ids) - 1 :]) < CLOSE


def test_the_engine_and_the_server_choose_the_same_words(server: Server, model: Any) -> None:
    thinking = [ids for ids in PROMPTS if ids[-1:] == [*THINKING.after]]
    replies, _ = sample(server, thinking, temperature=0.0)
    words = torch.tensor([reply[THINKING.steps :] for reply, _ in replies])
    values = torch.tensor([values[THINKING.steps :] for _, values in replies], dtype=torch.float64)
    assert THINKING.after[0] not in words.flatten().tolist(), "it thinks again in the middle of its reply; take another id"
    reasoner = LatentReasoner(model, Mode(patches="none"))
    with torch.no_grad():
        thoughts = reasoner.think(prompts(model, [Asked(tuple(ids)) for ids in thinking]), THINKING.steps)
        table = log_distribution(reasoner.read(thoughts, words).flatten(0, 1), [PLAIN], [THINKING.id]).view(*words.shape, -1)
    assert torch.equal(table.argmax(-1), words)
    assert torch.allclose(table.gather(2, words[..., None])[..., 0], values, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kept", [True, False])
def test_a_second_turn_is_right_over_kept_thoughts_and_over_thoughts_read_again(server: Server, model: Any, kept: bool) -> None:
    flush(server.url)
    first = [[*ids, *reply] for ids, (reply, _) in zip(PROMPTS, sample(server, PROMPTS)[0], strict=True)]
    second = [[*ids, 70, 71, *THINKING.after] for ids in first]
    if not kept:
        flush(server.url)
    replies, cached = sample(server, second)
    assert all((count > 0) == kept for count in cached)
    for ids, (reply, values) in zip(second, replies, strict=True):
        assert reply[: THINKING.steps] == [THINKING.id] * THINKING.steps
        assert far(values, in_process(model, [*ids, *reply])[len(ids) - 1 :]) < CLOSE


def test_a_prefix_that_ends_within_a_thought_is_taken_up_there(server: Server, model: Any) -> None:
    flush(server.url)
    [(reply, _)], _ = sample(server, [PROMPTS[0]])
    cut = [*PROMPTS[0], *reply[:2]]  # two thoughts of three
    [(rest, values)], [cached] = sample(server, [cut])
    assert cached == len(cut) - 1 and rest[0] == THINKING.id and rest[1] != THINKING.id
    assert far(values, in_process(model, [*cut, *rest])[len(cut) - 1 :]) < CLOSE


def test_a_recorded_reply_is_scored_as_it_was_sampled(server: Server) -> None:
    replies, _ = sample(server, PROMPTS)
    flush(server.url)
    whole = [[*ids, *reply] for ids, (reply, _) in zip(PROMPTS, replies, strict=True)]
    asked = {"input_ids": whole, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    for ids, (reply, values), answer in zip(PROMPTS, replies, post(server.url, "/generate", asked), strict=True):
        scored = [pair[0] for pair in answer["meta_info"]["input_token_logprobs"]][len(ids) :]
        words = [place for place, token in enumerate(reply) if token != THINKING.id]
        assert far([scored[place] for place in words], [values[place] for place in words]) < CLOSE
