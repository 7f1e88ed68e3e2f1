"""Hosted chat models: what they say becomes a codec's ids exactly, teaches by imitation, and never passes for a sample."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from PIL import Image

from monologue import hosted, imitate, load_policy, play, starter, verify
from monologue.agents.chat import ChatCodec
from monologue.agents.codec import Codec, CodecError, TinyCodec
from monologue.agents.messages import Action, Conclude, Look, Message, ParseFault, Reply
from monologue.agents.policy import Policy, Stream
from monologue.agents.questioner import CONCLUDE, KINDS, LOOK
from monologue.agents.spoken import named
from monologue.backends.base import BackendError, BackendTimeout, BackendUnavailable, Picture, Prompt, RequestRefused, Sampling
from monologue.backends.tokens import ByteTokenizer
from monologue.cli import main
from monologue.graphs.oracle import Seat, oracle
from monologue.retokenised import retokenise
from monologue.tasks.shapes import Shapes
from monologue.traces.schema import PolicyCall
from monologue.traces.store import RunError, RunReader
from monologue.training.gate import GateError
from monologue.training.policies import Learner
from monologue.training.reinforce import reinforce
from monologue.training.reinforcement import Reinforcement
from monologue.training.starter.models import build_questioner, build_tokenizer
from tests.tokens import HERMES, chat_tokenizer

PROBLEMS = list(Shapes(["attribute", "near"]).problems("train", 12))
ROLES = ("questioner", "answerer")
HEARD: dict[str, list[tuple[list[BaseMessage], dict[str, Any]]]] = {}
"""What each teacher was sent, by its name."""


class Teacher(BaseChatModel):
    """A LangChain chat model that says its lines in order; an exception among them is raised."""

    model_name: str = "teacher-1"
    lines: list[Any]

    @property
    def _llm_type(self) -> str:
        return "teacher"

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Any:
        return self.bind(tools=tools, **options)

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
        HEARD.setdefault(self.model_name, []).append((messages, options))
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return ChatResult(generations=[ChatGeneration(message=line)])


def spoken(action: Action) -> AIMessage:
    """An action as a provider returns it."""
    if isinstance(action, Reply):
        return AIMessage(action.text, usage_metadata={"input_tokens": 31, "output_tokens": 7, "total_tokens": 38})
    name, arguments = named(action)
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": "x", "type": "tool_call"}])


def teacher(codec: Codec | None = None, eyes: Any = None, name: str = "teacher-1") -> Seat:
    """The problem's own program, behind a chat interface."""

    def seat(graph: Any, problem: Any, role: str) -> Policy:
        lines = [spoken(action) for action in graph.oracle(problem)[role]]
        return hosted(Teacher(model_name=f"{name}-{role}", lines=lines), codec, eyes=eyes)

    return seat


@pytest.fixture(scope="module")
def students() -> Iterator[dict[str, Policy]]:
    found = {role: load_policy(starter(role), role) for role in ROLES}
    yield found
    for policy in found.values():
        asyncio.run(policy.backend.aclose())


@pytest.fixture(scope="module")
def taught(students: dict[str, Policy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("taught") / "run"
    seats = {role: teacher(students[role].codec, students[role].backend if role == "answerer" else None) for role in ROLES}
    summary = play("monologue", PROBLEMS, seats, run, progress=False)
    assert summary.ok == 12 and all(episode.score == 1.0 for episode in summary.episodes)
    return run


def calls(run: Path) -> list[PolicyCall]:
    return [call for episode in RunReader(run).episodes() for call in episode.calls()]


def test_a_teachers_words_are_the_students_ids(taught: Path, students: dict[str, Policy], tmp_path: Path) -> None:
    seats = {
        "questioner": oracle(students["questioner"].codec),
        "answerer": oracle(students["answerer"].codec, students["answerer"].backend),  # type: ignore[arg-type]
    }
    play("monologue", PROBLEMS, seats, tmp_path / "oracle", progress=False)

    def told(run: Path) -> list[Any]:
        found = ((call.role, call.turn, call.prompt_ids, call.sampled_ids, call.loss_mask, call.images) for call in calls(run))
        return sorted(found, key=repr)

    assert told(taught) == told(tmp_path / "oracle")
    for call in calls(taught):
        assert (call.engine, call.sampled_logprobs, call.trainable) == ("chat", None, True)
        assert call.sampling["temperature"] is None and call.model == f"teacher-1-{call.role}"
        assert call.reported == ((31, 7) if call.role == "answerer" else None)
    assert all(check.ok for check in verify(taught))


def test_imitation_learns_from_a_teacher(taught: Path, tmp_path: Path) -> None:
    build_questioner(3, build_tokenizer()).save_pretrained(tmp_path / "fresh")
    build_tokenizer().save_pretrained(tmp_path / "fresh")
    report = imitate(taught, tmp_path / "fresh", tmp_path / "q", role="questioner", steps=40, lr=3e-3)
    losses = [point["loss"] for point in report["curve"]]
    assert report["rows"] == 12 and losses[-1] < 0.4 * losses[0]


def test_a_run_in_nobodys_ids_is_put_into_the_students_by_the_command(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Id by id what the teacher would have said in the student's ids at once; imitation refuses the run as it lies."""
    play("monologue", PROBLEMS, dict.fromkeys(ROLES, teacher()), tmp_path / "words", progress=False)

    def told(run: Path, role: str) -> list[Any]:
        found = ((call.turn, call.prompt_ids, call.sampled_ids, call.images) for call in calls(run) if call.role == role)
        return sorted(found, key=repr)

    for role in ROLES:
        words = ["train", "imitate", "imitate", "--set", f'run="{tmp_path / "words"}"', "--set", f'role="{role}"', "--set", "steps=1"]
        assert main([*words, "--out", str(tmp_path / "refused")]) == 2 and "not trainable" in capsys.readouterr().err
        assert main([*words, "--out", str(tmp_path / role), "--retokenize"]) == 0
        assert "12 episodes said again" in capsys.readouterr().out
        assert told(tmp_path / role / "retokenised", role) == told(taught, role)
        with pytest.raises(RunError, match="holds another run"):  # the two would be mixed
            retokenise(taught, tmp_path / role / "retokenised", role, load_policy(starter(role), role))
    assert main(["train", "reinforce", "reinforce", "--retokenize"]) == 2 and "never sampled" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["grpo", "topr"])
def test_policy_gradients_refuse_a_teachers_words_and_say_why(taught: Path, tmp_path: Path, objective: str) -> None:
    recipe = {"runs": [str(taught)], "iterations": 1, "objective": {"name": objective}, "rows": 4, "reference": False}
    learner = {"questioner": Learner.open(str(starter("questioner")))}
    with pytest.raises(GateError, match=r"returned text only.*probability with which each token was sampled.*imitate"):
        reinforce(Reinforcement.read(recipe), tmp_path / objective, learner)


def test_a_trace_in_no_students_ids_is_whole_but_teaches_nobody(tmp_path: Path) -> None:
    HEARD.clear()
    run = tmp_path / "run"
    summary = play("monologue", PROBLEMS[:2], dict.fromkeys(ROLES, teacher(name="alone")), run, progress=False)
    assert summary.ok == 2 and all(check.ok for check in verify(run))
    found = calls(run)
    assert not any(call.trainable for call in found) and {len(call.images) for call in found} == {0, 1}
    assert all(call.sampled_logprobs is None for call in found)
    with pytest.raises(GateError, match="not trainable"):
        recipe = Reinforcement.read({"runs": [str(run)], "iterations": 1, "reference": False})
        reinforce(recipe, tmp_path / "rl", {"questioner": Learner.open(str(starter("questioner")))})
    messages, options = HEARD["alone-questioner"][-1]
    assert [message.type for message in messages[:2]] == ["system", "human"] and "look" in str(messages[0].content)
    assert {tool["function"]["name"] for tool in options["tools"]} == {"look", "conclude"} and "tool_choice" not in options
    for before, after in pairwise(messages):
        asked = [call["id"] for call in getattr(before, "tool_calls", ())]
        assert asked == ([after.tool_call_id] if after.type == "tool" else [])  # type: ignore[attr-defined]


def test_the_answerer_is_shown_the_very_picture_once(tmp_path: Path) -> None:
    HEARD.clear()
    play("monologue", PROBLEMS[:1], dict.fromkeys(ROLES, teacher(name="seeing")), tmp_path / "run", progress=False)
    messages, options = HEARD["seeing-answerer"][-1]
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    (shown,) = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    png = Image.open(io.BytesIO(base64.b64decode(shown.partition("base64,")[2])))
    assert png.tobytes() == PROBLEMS[0].pictures[0]().tobytes() and "tools" not in options


class Span:
    """Keeps what is recorded."""

    facts: dict[str, Any]

    def record(self, **call: Any) -> None:
        self.facts = call


CODECS: dict[str, Callable[[], Codec | None]] = {
    "bytes": lambda: None,
    "hermes": lambda: ChatCodec(chat_tokenizer(HERMES)),
    "tiny": lambda: TinyCodec(ByteTokenizer()),
}


def asked(line: Any, codec: Codec | None, force: Any = None, **options: Any) -> tuple[Any, dict[str, Any], Stream]:
    """What a questioner's seat makes of one line."""
    policy = hosted(Teacher(lines=line if isinstance(line, list) else [line]), codec, **options)
    span, stream = Span(), Stream(policy, "questioner", 1)
    action = asyncio.run(stream.act(span, [Message("user", "what?", choices=("red", "blue"))], KINDS, (LOOK, CONCLUDE), force))
    return action, span.facts, stream


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "args": arguments, "id": "x", "type": "tool_call"}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("force", [None, "look", "conclude"])
def test_a_call_is_the_action_whether_forced_or_not(codec: str, force: Any) -> None:
    HEARD.clear()
    wanted = Conclude("red", "b2 is red") if force == "conclude" else Look("where ?")
    action, facts, stream = asked(spoken(wanted), CODECS[codec](), force)
    assert action == (Conclude("red") if force and codec == "tiny" and isinstance(wanted, Conclude) else wanted)
    assert facts["prompt_ids"] + facts["sampled_ids"] == stream.ids and len(facts["loss_mask"]) == len(facts["sampled_ids"])
    assert HEARD["teacher-1"][-1][1].get("tool_choice") == force


@pytest.mark.parametrize("codec", ["bytes", "hermes"])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (AIMessage("I think that it is red."), "I think that it is red."),
        (AIMessage(""), ""),
        (AIMessage("", tool_calls=[call("look", question="a"), call("look", question="b")]), '"question": "b"'),
        (AIMessage("", tool_calls=[call("look", quest="where ?")]), '"quest": "where ?"'),
        (AIMessage("", tool_calls=[call("look", question="a", region=[0, 0, 2, 2])]), '"region": [0, 0, 2, 2]'),
        (
            AIMessage("", invalid_tool_calls=[{"name": "look", "args": '{"que', "id": "x", "error": "", "type": "invalid_tool_call"}]),
            '{"que',
        ),
        (AIMessage('<tool_call>\n{"name": "conclude", "arguments": {"answer": "red"}}\n</tool_call>'), '"answer": "red"'),
    ],
)
def test_a_reply_that_is_no_action_is_a_fault_with_its_own_words(codec: str, line: AIMessage, words: str) -> None:
    action, facts, stream = asked(line, CODECS[codec]())
    assert isinstance(action, ParseFault) and facts["action"] is None and facts["parse_error"]
    assert words in stream.policy.codec.text(facts["sampled_ids"])


def test_words_in_the_place_of_a_forced_call_are_never_read_as_one() -> None:
    for codec in ("bytes", "hermes"):
        assert isinstance(asked(AIMessage("red"), CODECS[codec](), "conclude")[0], ParseFault)
        assert isinstance(asked(spoken(Look("where ?")), CODECS[codec](), "conclude")[0], ParseFault)
    assert isinstance(asked(spoken(Look("where ?")), CODECS["tiny"](), "conclude")[0], ParseFault)
    with pytest.raises(CodecError, match="nothing is made of it"):
        asked(AIMessage("red"), CODECS["tiny"](), "conclude")


def test_a_teacher_that_uses_words_the_student_lacks_is_refused_by_name(students: dict[str, Policy]) -> None:
    with pytest.raises(CodecError, match="elephant"):
        asked(spoken(Look("where is the elephant ?")), students["questioner"].codec)


def test_a_reply_cut_off_at_its_length_is_recorded_so() -> None:
    policy = hosted(Teacher(lines=[AIMessage("it is re", response_metadata={"finish_reason": "length", "model_name": "teacher-1-2026"})]))
    span, stream = Span(), Stream(policy, "answerer", 1)
    assert asyncio.run(stream.act(span, [Message("user", "what?")], (Reply,))) == Reply("it is re")
    assert span.facts["truncated"] and span.facts["sampled_ids"][-1] not in policy.codec.stop_ids
    assert span.facts["weights_version"] == "teacher-1-2026", "what the provider says that it served"


class Status(Exception):
    """As the SDKs raise it."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code


def wrapped(cause: Exception) -> Exception:
    error = RuntimeError("connection error")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "wanted", "times"),
    [
        (Status(429), BackendUnavailable, 2),
        (Status(503), BackendUnavailable, 2),
        (wrapped(ConnectionRefusedError("no")), BackendUnavailable, 2),
        (wrapped(TimeoutError("late")), BackendTimeout, 1),
        (Status(401), RequestRefused, 1),
        (ValueError("odd"), BackendError, 1),
    ],
)
def test_errors_are_typed_named_and_tried_again_where_that_can_help(error: Exception, wanted: type[Exception], times: int) -> None:
    HEARD.clear()
    with pytest.raises(BackendError, match=r"'teacher-1' \(a dialogue of 2 messages\), attempt") as caught:
        asked([error, error, error], None, attempts=2)
    assert type(caught.value) is wanted and len(HEARD["teacher-1"]) == times and caught.value.__cause__ is error
    if times > 1:
        assert asked([error, spoken(Look("where ?"))], None)[0] == Look("where ?")


def test_a_model_that_hangs_is_left_at_the_deadline_and_a_cancelled_call_ends() -> None:
    ended = []

    class Hanging(Teacher):
        async def _agenerate(self, *_: Any, **__: Any) -> ChatResult:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("left")
            raise AssertionError

    async def cancelled() -> None:
        policy = hosted(Hanging(lines=[]))
        task = asyncio.create_task(Stream(policy, "q", 1).act(Span(), [Message("user", "what?")], (Reply,)))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while len(ended) < 2:
            await asyncio.sleep(0.01)

    stream = Stream(hosted(Hanging(lines=[]), timeout=0.1), "q", 1)
    with pytest.raises(BackendTimeout, match="teacher-1"):
        asyncio.run(stream.act(Span(), [Message("user", "what?")], (Reply,)))
    asyncio.run(cancelled())


def test_what_a_chat_model_cannot_do_is_refused_with_a_sentence() -> None:
    class Toolless(Teacher):
        def bind_tools(self, tools: Sequence[Any], **options: Any) -> Any:
            raise NotImplementedError

    engine = hosted(Teacher(lines=[])).backend
    for attempt, words in (
        (engine.generate(Prompt((1,)), Sampling()), "reads no ids"),
        (engine.score(Prompt((1,)), (1,), Sampling()), "text only"),
        (engine.load("weights", "v2"), "hosted by somebody else"),
    ):
        with pytest.raises(RequestRefused, match=words):
            asyncio.run(attempt)
    cool = Policy(engine, ChatCodec(chat_tokenizer(HERMES)), Sampling(temperature=0.5))
    with pytest.raises(RequestRefused, match="on the chat model itself"):
        asyncio.run(Stream(cool, "q", 1).act(Span(), [Message("user", "x")], (Reply,)))
    with pytest.raises(RequestRefused, match="takes no tools"):
        policy = hosted(Toolless(lines=[]))
        asyncio.run(Stream(policy, "q", 1).act(Span(), [Message("user", "x")], KINDS, (LOOK,)))
    with pytest.raises(CodecError, match="lent no eyes"):
        seen = Message("user", "x", (Picture("0" * 64, Image.new("RGB", (84, 84))),))
        policy = hosted(Teacher(lines=[]), TinyCodec(ByteTokenizer()))
        asyncio.run(Stream(policy, "a", 1).act(Span(), [seen], (Reply,)))
    with pytest.raises(ValueError, match="timeout"):
        hosted(Teacher(lines=[]), timeout=0)
    with pytest.raises(ValueError, match="codec is missing"):
        hosted(Teacher(lines=[]), eyes=engine)  # type: ignore[arg-type]


def test_a_hosted_model_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'jinja2', 'langchain'))\n"
        "import monologue; from langchain_core.language_models import FakeListChatModel\n"
        "from monologue import Shapes\n"
        "problems = list(Shapes().problems('train', 1)); seat = monologue.hosted(FakeListChatModel(responses=[problems[0].choices[0]]))\n"
        "print(monologue.play('direct', problems, {'answerer': seat}, sys.argv[1], progress=False).ok)"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{folder}/run"], capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )
    assert done.stdout.strip() == "1", done.stderr


def test_a_dialogue_with_faults_and_tools_keeps_to_the_chat_form() -> None:
    lines = [AIMessage("hm"), spoken(Look("where ?")), spoken(Conclude("red"))]
    policy, span = hosted(Teacher(model_name="form", lines=lines)), Span()
    stream = Stream(policy, "questioner", 1)

    async def dialogue() -> None:
        for heard in (Message("user", "what?"), Message("user", "again"), Message("tool", "b2")):
            await stream.act(span, [heard], KINDS, (LOOK, CONCLUDE))

    asyncio.run(dialogue())
    assert [message.type for message in HEARD["form"][-1][0]] == ["system", "human", "ai", "human", "ai", "tool"]
    assert json.loads(span.facts["action"]) == {"kind": "conclude", "answer": "red"}


def test_the_command_line_says_what_a_hosted_model_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("langchain", "langchain.chat_models"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, words in (("chat:openai:some-model", "pip install 'monologue[chat]'"), ("chat:some-model", "chat:PROVIDER:MODEL")):
        assert main(["play", "--questioner", name, "--graph", "blind", "--n", "1"]) == 2
        assert words in capsys.readouterr().err
