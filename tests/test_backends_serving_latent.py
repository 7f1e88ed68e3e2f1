"""What a server that thinks is told, and how its thoughts are told from words; real servers: tests_real/served/test_served_looking.py."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from monologue.asked import settle as settle_play
from monologue.backends.base import BackendError, Generation, ImageFacts, Prompt, RequestRefused, Sampling
from monologue.backends.checkpoints import open_config
from monologue.backends.latent import Habit
from monologue.backends.perception.modes import Mode
from monologue.backends.serving.latent import MODELS, PACKAGE, Thinking, environment
from monologue.cli import parser
from monologue.seating import starter
from monologue.serving import orders_of, play_command, settle
from monologue.usage import UsageError
from tests import tiny_models as tiny
from tests.tokens import PLAIN, chat_tokenizer

STEPS = Thinking(id=100, after=(5,), steps=2, patches=2, patches_first=True, room=20)
SAMPLING = Sampling(max_tokens=3)


def said(*ids: int, **more: Any) -> Generation:
    return Generation(ids, tuple(-float(place) for place in range(len(ids))), "stop", "v1", **more)


def test_who_serves_says_how_to_play() -> None:
    addresses = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert play_command({"questioner": addresses[:1], "answerer": addresses}).endswith(
        "--backend sglang --questioner http://127.0.0.1:1 --answerer http://127.0.0.1:1,http://127.0.0.1:2"
    )
    options = parser().parse_args(play_command({"thinker": addresses[:1]}, "hops").split()[1:])
    settle_play(options, 20)
    assert options.graph == "latent" and options.thinker == addresses[0]


def test_a_configuration_without_architecture_is_refused() -> None:
    config = open_config(str(starter("thinker")))
    config.architectures = None
    with pytest.raises(ValueError, match="one name under 'architectures'"):
        environment(config)


def test_a_server_is_told_how_its_checkpoint_was_taught_and_the_client_hears_the_same() -> None:
    config, habit = open_config(str(starter("thinker"))), Habit.load(starter("thinker"))
    thinking = Thinking.of(habit, config, after=(5,), room=12)
    flag, told, *graphs = thinking.flags(config)
    assert flag == "--json-model-override-args" and all("cuda-graph" in graph for graph in graphs) and len(graphs) == 2
    assert Thinking.told({"json_model_override_args": told}) == thinking and thinking.patches_first and thinking.think == habit.think
    assert json.loads(told)["vocab_size"] == json.loads(told)["text_config"]["vocab_size"] == thinking.id + 13
    assert environment(config)["SGLANG_EXTERNAL_MM_MODEL_ARCH"] == "LatentQwen2VLForConditionalGeneration"
    assert Thinking.told({"json_model_override_args": "{}"}) is None is Thinking.told({})
    text = open_config(str(starter("questioner")))
    assert Thinking(200, (4, 5), 3).flags(text)[:1] == (flag,) and "SGLANG_EXTERNAL_MM_MODEL_ARCH" not in environment(text)
    with pytest.raises(ValueError, match="in process only"):
        STEPS.flags(text)


@pytest.mark.parametrize(
    "mode",
    [
        Mode(order="state-first", selects="state"),
        Mode(bottleneck="question"),
        Mode(positions="flat"),
        Mode(thought="pause", pause_id=3),
        Mode(reuse=True),
        Mode(patches="random"),
    ],
)
def test_a_habit_that_a_server_cannot_follow_is_refused(mode: Mode) -> None:
    with pytest.raises(ValueError, match="in process"):
        Thinking.of(Habit(mode, 2), open_config(str(starter("thinker"))), after=(5,), room=12)


def test_a_server_is_not_told_to_wait_for_a_word_that_its_model_does_not_have() -> None:
    """The ids behind its vocabulary are thoughts there."""
    config = open_config(str(starter("thinker")))
    with pytest.raises(BackendError, match="of the model's vocabulary, got 61"):
        Thinking.of(Habit(Mode(), 2, think=61), config, after=(5,), room=12)


def test_thoughts_are_told_from_words_and_words_are_no_more_than_were_asked_for() -> None:
    thoughts = (103, 101, 100, 119, 120, 100)
    found = STEPS.apart(said(*thoughts, 7, 8, 2, weights=(("v0", 0, 7), ("v1", 7, 9))), SAMPLING)
    assert found.ids == (7, 8, 2) and found.logprobs == (-6.0, -7.0, -8.0) and found.finish_reason == "stop"
    assert [thought.chosen for thought in found.thoughts] == [(2, 0), (18, 19)] and found.weights == (("v0", 0, 1), ("v1", 1, 3))
    assert STEPS.spelled([(2, 0), (18, 19)]) == thoughts
    assert replace(STEPS, patches_first=False).spelled([(2, 0)]) == (100, 103, 101)
    early = replace(STEPS, think=6).apart(
        said(103, 101, 100, 7, 8, 9, 10, weights=(("v1", 0, 5), ("v2", 5, 7))), replace(SAMPLING, max_tokens=2)
    )
    assert early.ids == (7, 8) and early.weights == () and early.weights_version == "v1" and early.finish_reason == "length"
    cut = STEPS.apart(said(*thoughts, 7, 8, 9, 10), SAMPLING)
    assert cut.ids == (7, 8, 9) and cut.finish_reason == "length"
    stopped = replace(STEPS, think=6)
    assert len(stopped.apart(said(*thoughts[:3], 7), SAMPLING).thoughts) == 1 and not stopped.apart(said(7), SAMPLING).thoughts


@pytest.mark.parametrize(
    "ids", [(103, 101, 100, 7), (7, 8), (103, 101, 100, 119, 120, 7), (103, 101, 100, 119, 120, 100, 7, 100), (100, 103, 101) * 2]
)
def test_thoughts_that_are_not_as_they_must_be_are_an_error(ids: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match="expected"):
        STEPS.apart(said(*ids), SAMPLING)


def test_thoughts_follow_ids_and_servers_of_another_version_are_told_apart() -> None:
    for wrong in ((), 5, [5]):
        with pytest.raises(ValueError, match="tuple of ids"):
            Thinking(id=100, after=wrong, steps=2)  # type: ignore[arg-type]
    for told in (5, [], None):
        facts = json.dumps({"latent": {"id": 100, "after": told, "steps": 2, "order": "state-first"}})
        with pytest.raises(BackendError, match="start it again"):
            Thinking.told({"json_model_override_args": facts})


def test_a_server_knows_where_thoughts_follow_across_what_it_has_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file runs in the server's Python; what it takes from SGLang stands in the way here only of importing it."""
    parts = {"layers.logits_processor": ("LogitsMetadata", "LogitsProcessor"), "layers.radix_attention": ("RadixAttention",)}
    parts |= {"model_executor.forward_context": ("get_req_to_token_pool", "get_token_to_kv_pool")}
    parts |= {"runtime_context": ("get_parallel", "get_server_args")}
    for name, things in parts.items():
        monkeypatch.setitem(sys.modules, f"sglang.srt.{name}", SimpleNamespace(**dict.fromkeys(things, object)))
    spec = importlib.util.spec_from_file_location("steps", MODELS / PACKAGE / "steps.py")
    assert spec is not None and spec.loader is not None
    steps = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "steps", steps)
    spec.loader.exec_module(steps)
    model, places = steps.Latent.__new__(steps.Latent), steps.Places.__new__(steps.Places)
    model.after, model._ids = [7, 9, 7], torch.tensor([7, 7, 9, 7, 9, 7, 5, 9, 7, 9, 7])  # slot 0 is nobody's
    places.table = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]])
    places.requests, places.lane = torch.tensor([0, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    places.place = torch.tensor([2, 3, 4, 0, 1, 2, 3])  # of the first request two places were read before
    assert model._reached(places).tolist() == [True, False, True, False, False, False, True]


def test_a_prompt_over_which_a_server_would_not_think_as_in_process_is_refused() -> None:
    pictures = {count: [ImageFacts("x", 56, 56, (1, 2, count), 0, count, "p")] for count in (3, 4, 20, 21)}
    for count in (4, 20):
        STEPS.admit(Prompt((1, 5)), pictures[count])
    for ids, count in (((1, 6), 4), ((1, 5), 3), ((1, 5), 21)):
        with pytest.raises(RequestRefused):
            STEPS.admit(Prompt(ids), pictures[count])


def test_serve_starts_a_thinker_as_it_was_taught_and_refuses_who_was_not(tmp_path: Path) -> None:
    def orders(*words: str) -> list[tuple[str, dict[str, Any]]]:
        options: argparse.Namespace = parser().parse_args(
            ["serve", "--device", "cpu", "--questioner", "none", "--answerer", "none", *words]
        )
        settle(options)
        return orders_of(options)

    [(role, order)] = orders("--thinker", "starter")
    told = Thinking.told({"json_model_override_args": order["flags"][1]})
    assert role == "thinker" and told is not None and (told.after, told.steps, told.patches) == ((5,), 5, 2)
    assert "monologue_latent" in order["extra"].values()
    chatty, tokenizer = tiny.save_vision_model(tmp_path / "chatty", "qwen2"), chat_tokenizer(PLAIN)
    tokenizer.save_pretrained(chatty)
    Habit(Mode(k=2), 2).save(chatty)
    [(_, order)] = orders("--thinker", str(chatty))
    told = Thinking.told({"json_model_override_args": order["flags"][1]})
    assert told is not None and tokenizer.decode(told.after) == "<|im_end|>\n<|im_start|>assistant\n"
    plain = PLAIN.replace("<|im_start|>assistant", "ASSISTANT:").replace("{{ part.text }}", "{{ part.text }}.")
    tokenizer.chat_template = plain.replace("<|im_end|>", "{% if message.role == 'assistant' %}<|im_end|>{% endif %}")
    tokenizer.save_pretrained(chatty)
    with pytest.raises(UsageError, match=r"cannot be served as a thinker: .*ASSISTANT:.* as their common end"):
        orders("--thinker", str(chatty))
    with pytest.raises(BackendError, match="not taught to think"):
        orders("--thinker", str(starter("answerer")))
    with pytest.raises(UsageError, match="nothing to serve"):
        orders()
