"""The chat engine against SGLang's OpenAI-compatible endpoint, by ``langchain-openai``: tools go out, a real tool call comes back.

The checkpoint is made by hand: whatever it is told, its weights say one call, in two tokens, so that SGLang's parser has something to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_openai import ChatOpenAI
from tokenizers import AddedToken
from transformers import Qwen3Config, Qwen3ForCausalLM

from monologue import hosted, play, verify
from monologue.agents.chat import ChatCodec
from monologue.agents.messages import Look, Message, ParseFault, Reply
from monologue.agents.policy import Stream
from monologue.agents.questioner import CONCLUDE, KINDS, LOOK
from monologue.backends.base import BackendUnavailable, RequestRefused
from monologue.backends.serving.launch import Server, launch
from monologue.cli import main
from monologue.graphs.oracle import scripted
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from tests.tokens import HERMES, chat_tokenizer
from tests_real.served.kit import PYTHON

LINE = Look("where is the red star ?")
TOOLS = (LOOK, CONCLUDE)


def single_minded(folder: Path) -> Path:
    """A Qwen3 whose layers add nothing, so the last token alone decides the next: newline, head of a call, rest of it, end of turn."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(HERMES)
    call = ChatCodec(tokenizer).text(ChatCodec(tokenizer).action_ids(LINE)[:-1])
    cut = call.index('"arguments"')
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in (call[:cut], call[cut:])])
    newline, head, rest = (tokenizer.encode(part)[0] for part in ("\n", call[:cut], call[cut:]))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    marks = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **marks, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for before, after in ((newline, head), (head, rest), (rest, tokenizer.eos_token_id)):
            model.lm_head.weight[after] = 10 * model.model.embed_tokens.weight[before]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat")
    flags = ("--tool-call-parser", "qwen25", "--served-model-name", "one-call")
    with launch(str(single_minded(folder / "model")), python=str(PYTHON), device="cpu", log=folder / "log", flags=flags) as started:
        yield started


def model(server: Server, **options: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 160, "max_retries": 0, **options}
    return ChatOpenAI(model="one-call", base_url=f"{server.url}/v1", api_key="none", **settings)


class Span:
    """Keeps what is recorded."""

    facts: dict[str, Any]

    def record(self, **call: Any) -> None:
        self.facts = call


async def said(chat: ChatOpenAI, tools: Any = TOOLS, kinds: Any = KINDS, force: Any = None) -> tuple[Any, dict[str, Any]]:
    span = Span()
    action = await Stream(hosted(chat, attempts=1), "questioner", 1).act(span, [Message("user", "what?")], kinds, tools, force)
    return action, span.facts


def test_a_real_tool_call_is_an_action_turn_after_turn(server: Server, tmp_path: Path) -> None:
    student = ChatCodec(chat_tokenizer(HERMES))
    seats = {"questioner": hosted(model(server), student), "answerer": scripted()}
    problem = next(one for one in Shapes().problems("train", 50) if len(one.oracle or ()) >= 2)
    summary = play("monologue", [problem], seats, tmp_path / "run", max_turns=3, progress=False)
    assert summary.ok == 1
    (episode,) = RunReader(tmp_path / "run").episodes()
    calls = [call for call in episode.calls() if call.role == "questioner"]
    assert [student.parse(call.sampled_ids) for call in calls] == [LINE] * 3
    for call in calls:
        assert call.sampled_ids == student.action_ids(LINE) and call.sampled_logprobs is None and call.trainable
        assert call.reported is not None and call.reported[0] > 100 and call.reported[1] == 3, "the server counts two tokens and a stop"
    assert all(check.ok for check in verify(tmp_path / "run"))


async def test_a_reply_that_is_no_call_comes_back_word_for_word(server: Server) -> None:
    action, facts = await said(model(server, max_tokens=1), (), (Reply,))
    assert isinstance(action, Reply) and '{"name": "look",' in action.text and facts["truncated"] and facts["reported"][1] == 1
    action, facts = await said(model(server), (), (Reply,))
    assert isinstance(action, Reply) and '"question": "where is the red star ?"' in action.text and not facts["truncated"]
    action, facts = await said(model(server, max_tokens=1))
    assert isinstance(action, ParseFault) and facts["truncated"] and facts["output"] == "", "SGLang keeps a call back that was cut off"


async def test_the_servers_refusal_is_told(server: Server) -> None:
    with pytest.raises(RequestRefused, match="one-call"):  # it runs without a grammar, so it can force no call
        await said(model(server), force="conclude")
    with pytest.raises(BackendUnavailable, match="cannot be reached"):
        await said(ChatOpenAI(model="one-call", base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0))


def test_the_command_plays_a_hosted_model(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    words = ["play", "--questioner", "chat:openai:one-call", "--n", "1", "--max-turns", "2", "--max-tokens", "160"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    (episode,) = RunReader(tmp_path / "run").episodes()
    engines = {(call.role, call.engine, call.trainable) for call in episode.calls()}
    assert engines == {("questioner", "chat", False), ("answerer", "transformers", True)}
