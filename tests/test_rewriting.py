"""Rationales rewritten as dialogues: strictly read, asked once more, never dropped, never asked twice for what is there."""

import json
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from monologue.cli import main
from monologue.rewriting import MOST_TURNS, dialogue_of
from monologue.tasks.dialogues import Dialogues
from tests.test_tasks_corpora import M3COT, SCIENCE, png, shown, written

TURN = {"question": "What leans over the edge?", "reply": "The book."}
GOOD = json.dumps({"turns": [TURN]})


class Rewriter(BaseChatModel):
    """Replies with what ``says`` makes of the messages."""

    model_name: str = "rewriter-1"
    says: Callable[[list[str]], Any]
    heard: ClassVar[list[list[str]]] = []

    @property
    def _llm_type(self) -> str:
        return "rewriter"

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
        words = [str(message.content) for message in messages]
        self.heard.append(words)
        said = self.says(words)
        if isinstance(said, Exception):
            raise said
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])


Says = Callable[[Callable[[list[str]], Any]], None]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Puts a model behind LangChain's names."""
    Rewriter.heard.clear()

    def put(function: Callable[[list[str]], Any]) -> None:
        module = types.ModuleType("langchain.chat_models")
        module.init_chat_model = lambda model, model_provider: Rewriter(model_name=model, says=function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "langchain", types.ModuleType("langchain"))
        monkeypatch.setitem(sys.modules, "langchain.chat_models", module)

    return put


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three problems with pictures and one without."""
    folder = tmp_path / "m3cot"
    folder.mkdir()
    (folder / "one.png").write_bytes(png("blue"))
    records = [{**shown(M3COT), "question": f"What will fall {word}?"} for word in ("first", "second")]
    return written(folder, [*records, {**M3COT, "image": None}, {**M3COT, "question": "What will fall third?", "image": "one.png"}])


def words(corpus: Path, out: Path, *more: str) -> list[str]:
    return ["rewrite", "--task", "m3cot", "--folder", str(corpus), "--model", "chat:fake:rewriter-1", "--out", str(out), *more]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_corpus_becomes_dialogues_that_play(corpus: Path, tmp_path: Path, says: Says, capsys: pytest.CaptureFixture[str]) -> None:
    says(lambda told: GOOD)
    out = tmp_path / "out"
    assert main(words(corpus, out)) == 0
    assert "3 rationales rewritten, 0 failed" in capsys.readouterr().out
    assert [told[1].splitlines()[2] for told in Rewriter.heard] == ["Answer: the book"] * 3
    assert all("Rationale: The book leans over the edge." in told[1] for told in Rewriter.heard)
    problems = list(Dialogues(out).problems("train"))
    assert {(problem.choices[problem.gold or 0], problem.family) for problem in problems} == {("the book", "commonsense")}
    colours = {problem.question.split()[3]: problem.pictures[0]().getpixel((0, 0)) for problem in problems}
    assert colours == {"first?": (255, 0, 0), "second?": (255, 0, 0), "third?": (0, 0, 255)}
    play = ["play", "--task", "dialogues", "--folder", str(out), "--split", "train", "--backend", "scripted"]
    assert main([*play, "--out", str(tmp_path / "run")]) == 0
    assert "accuracy 1.000 ± 0.000  (n = 3" in capsys.readouterr().out


def test_a_reply_that_does_not_fit_is_told_why_and_asked_for_once_more(corpus: Path, tmp_path: Path, says: Says) -> None:
    says(lambda told: GOOD if len(told) > 2 else f"```json\n{GOOD}\n```")
    assert main(words(corpus, tmp_path / "out", "--n", "1")) == 0
    (_, again) = Rewriter.heard
    assert again[2].startswith("```json") and "expected one JSON object and nothing around it" in again[3]
    assert [line["turns"] for line in lines(tmp_path / "out" / "train.jsonl")] == [[TURN]]


def test_what_fails_twice_is_recorded_with_its_reason_and_asked_again_by_the_same_command(
    corpus: Path, tmp_path: Path, says: Says, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    says(lambda told: '{"turns": [{"question": "", "reply": "It is the book."}]}' if "second" in told[1] else GOOD)
    assert main(words(corpus, out)) == 1
    told = capsys.readouterr().out
    assert "2 rationales rewritten, 1 failed" in told and "--split train --n 2" in told and len(Rewriter.heard) == 4
    assert re.search("the last one: .*words as the question of turn 1", told)
    (failed,) = lines(out / "failed.jsonl")
    assert failed["id"] == "m3cot/train/1" and "words as the question of turn 1" in failed["reason"] and "It is the book" in failed["reply"]
    Rewriter.heard.clear()
    says(lambda told: GOOD)
    assert main(words(corpus, out)) == 0
    assert "1 rationales rewritten, 0 failed; 2 were there before" in capsys.readouterr().out
    assert len(Rewriter.heard) == 1 and "second" in Rewriter.heard[0][1]
    assert lines(out / "failed.jsonl") == [] and len(list(Dialogues(out).problems("train"))) == 3


def test_a_line_that_a_kill_cut_off_is_asked_for_again(corpus: Path, tmp_path: Path, says: Says) -> None:
    says(lambda told: GOOD)
    file = tmp_path / "out" / "train.jsonl"
    assert main(words(corpus, tmp_path / "out", "--concurrency", "1")) == 0
    whole = file.read_text()
    file.write_text(whole[:-30])
    Rewriter.heard.clear()
    assert main(words(corpus, tmp_path / "out")) == 0
    assert file.read_text() == whole and len(Rewriter.heard) == 1


def test_what_has_no_rationale_or_no_picture_that_opens_is_recorded_and_never_asked(tmp_path: Path, says: Says) -> None:
    says(lambda told: GOOD)
    folder, out = tmp_path / "science", tmp_path / "out"
    folder.mkdir()
    (folder / "bad.png").write_text("no picture")
    records = [{**shown(SCIENCE), "lecture": "", "solution": ""}, {**SCIENCE, "image": "bad.png"}, {**shown(SCIENCE), "choices": ["a"]}]
    written(folder, [*records, shown(SCIENCE)])
    told = [word if word != "m3cot" else "scienceqa" for word in words(folder, out)]
    assert main(told) == 1 and len(Rewriter.heard) == 1
    reasons = {line["id"][-1]: line["reason"] for line in lines(out / "failed.jsonl")}
    assert (
        set(reasons) == {"0", "1", "2"}
        and "no rationale" in reasons["0"]
        and "convert it" in reasons["1"]
        and "two or more" in reasons["2"]
    )


def test_calls_that_keep_failing_end_the_command_and_one_that_does_is_recorded(
    corpus: Path, tmp_path: Path, says: Says, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Exception):
        status_code = 401

    says(lambda told: Refused("wrong key") if "second" in told[1] else GOOD)
    assert main(words(corpus, tmp_path / "some")) == 1
    assert "wrong key" in lines(tmp_path / "some" / "failed.jsonl")[0]["reason"]
    monkeypatch.setattr("monologue.rewriting.IN_A_ROW", 2)
    says(lambda told: Refused("wrong key"))
    assert main(words(corpus, tmp_path / "none", "--concurrency", "1")) == 2
    assert re.search("2 calls in a row brought no reply.*wrong key", capsys.readouterr().err)
    assert len(lines(tmp_path / "none" / "failed.jsonl")) == 2


def test_another_corpus_under_the_same_names_is_refused(
    corpus: Path, tmp_path: Path, says: Says, capsys: pytest.CaptureFixture[str]
) -> None:
    says(lambda told: GOOD)
    assert main(words(corpus, tmp_path / "out")) == 0
    written(corpus, [shown({**M3COT, "question": "Quite another?"})])
    assert main(words(corpus, tmp_path / "out")) == 2
    assert "name another --out" in capsys.readouterr().err


def test_bad_options_are_refused(corpus: Path, tmp_path: Path, says: Says, capsys: pytest.CaptureFixture[str]) -> None:
    says(lambda told: GOOD)
    (tmp_path / "file").write_text("")
    for more, told in (
        (["--model", "openai:x"], "chat:PROVIDER:MODEL"),
        (["--model", "chat:x"], "chat:PROVIDER:MODEL"),
        (["--n", "0"], "--n must be at least 1"),
        (["--concurrency", "0"], "--concurrency must be"),
        (["--split", "test"], "test*.jsonl"),
        (["--out", str(tmp_path / "file")], "cannot make"),
    ):
        assert main(words(corpus, tmp_path / "out", *more)) == 2
        assert told in capsys.readouterr().err, more
    assert not (tmp_path / "out").exists() and not Rewriter.heard


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ("", "nothing around it"),
        (f"Here you are: {GOOD}", "nothing around it"),
        ("[" * 100_000, "nothing around it"),
        (json.dumps([TURN]), 'the one key "turns"'),
        (json.dumps({"turns": [TURN], "answer": "the cup"}), 'the one key "turns"'),
        (json.dumps({"turns": []}), "one or more"),
        (json.dumps({"turns": [TURN, {"reply": "So it is the book."}]}), "turn 2"),
        (json.dumps({"turns": [TURN] * (MOST_TURNS + 1)}), "at most 7 turns, got 8"),
    ],
    ids=["empty", "around", "deep", "list", "answer", "none", "unasked", "many"],
)
def test_replies_of_another_form_are_refused(reply: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dialogue_of(reply)


class Service(BaseHTTPRequestHandler):
    """OpenAI's chat completions over HTTP."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"role": "assistant", "content": GOOD}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "rewriter-1"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        data = json.dumps({**body, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def service() -> Iterator[str]:
    Service.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_langchains_own_openai_class_rewrites_over_http(
    corpus: Path, tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("langchain_openai", reason="needs pip install 'monologue[chat]'")
    monkeypatch.setenv("OPENAI_BASE_URL", service)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    told = [word if not word.startswith("chat:") else "chat:openai:rewriter-1" for word in words(corpus, tmp_path / "out")]
    assert main(told) == 0
    assert [len(body["messages"]) for body in Service.asked] == [2, 2, 2] and "image_url" not in json.dumps(Service.asked)
    assert len(list(Dialogues(tmp_path / "out").problems("train"))) == 3
