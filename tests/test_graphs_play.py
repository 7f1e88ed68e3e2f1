"""Episodes end to end with scripted policies and oracles: traces that train, faults that are data, resume, controls."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.tools import StructuredTool
from PIL.Image import Image

from monologue.agents.chat import ChatCodec
from monologue.agents.codec import TinyCodec
from monologue.agents.messages import Conclude, Look, Message, Reply
from monologue.agents.policy import Policy
from monologue.backends.base import BackendError, BackendTimeout, BackendUnavailable, Generation, Prompt, Sampling
from monologue.backends.scripted import Request, ScriptedBackend
from monologue.backends.tokens import ByteTokenizer
from monologue.graphs.controls import partners
from monologue.graphs.oracle import Seat, oracle
from monologue.graphs.play import aplay, play
from monologue.graphs.registry import listed
from monologue.graphs.state import GraphError
from monologue.tasks.base import OracleTurn, Problem
from monologue.tasks.shapes import Shapes
from monologue.traces.schema import PolicyCall
from monologue.traces.store import RunReader
from monologue.traces.verify import verify
from tests.tokens import HERMES, PLAIN, chat_tokenizer, tiny_tokenizer

CODEC = TinyCodec(tiny_tokenizer())
EYES = ScriptedBackend([], tiny_tokenizer())


def problems(n: int, *families: str) -> list[Problem]:
    return list((Shapes(families) if families else Shapes()).problems("train", n))


def scripted(replies: object, codec: TinyCodec = CODEC) -> Policy:
    return Policy(ScriptedBackend(replies, tiny_tokenizer()), codec)  # type: ignore[arg-type]


def oracles() -> dict[str, Seat]:
    return {"questioner": oracle(CODEC), "answerer": oracle(CODEC, EYES)}


def calls(run: Path) -> list[list[PolicyCall]]:
    return [list(episode.calls()) for episode in RunReader(run).episodes()]


def text(call: PolicyCall) -> str:
    return CODEC.text(call.sampled_ids)


def test_the_oracle_answers_everything_and_every_stream_grows_verbatim(tmp_path: Path) -> None:
    summary = play("monologue", problems(20), oracles(), tmp_path / "run")
    assert summary.score().accuracy == 1 and not summary.failed
    for episode in calls(tmp_path / "run"):
        for role in ("questioner", "answerer"):
            stream = [call for call in episode if call.role == role]
            for before, after in pairwise(stream):
                grown = before.prompt_ids + before.sampled_ids
                assert after.prompt_ids[: len(grown)] == grown and after.prefix_length == len(grown)


@pytest.mark.parametrize("control", [None, "shuffle-answers", "wrong-picture"])
def test_a_played_run_passes_every_check(tmp_path: Path, control: str | None) -> None:
    play("monologue", problems(20), oracles(), tmp_path / "run", control=control)
    assert [check for check in verify(tmp_path / "run") if not check.ok] == []


def test_oracle_traces_hold_what_open_action_ids_and_extend_say(tmp_path: Path) -> None:
    problem = problems(1, "kin")[0]
    play("monologue", [problem], oracles(), tmp_path / "run")
    last = [call for call in calls(tmp_path / "run")[0] if call.role == "questioner"][-1]
    ids = CODEC.open([Message("user", problem.question, choices=problem.choices)])
    for turn in problem.oracle or ():
        ids += CODEC.action_ids(Look(turn.question)) + CODEC.extend([Message("tool", turn.reply)])
    assert last.prompt_ids == ids and last.sampled_ids == CODEC.action_ids(Conclude(problem.choices[problem.gold or 0]))
    assert last.trainable and last.sampled_logprobs is None and set(last.loss_mask) == {1}


def test_pictures_are_located_where_their_placeholders_stand(tmp_path: Path) -> None:
    play("monologue", problems(3), oracles(), tmp_path / "run")
    for episode in calls(tmp_path / "run"):
        for call in episode:
            pad = EYES.image_token_id
            for image in call.images:
                span = range(image.placeholder_start, image.placeholder_start + image.placeholder_count)
                assert {call.prompt_ids[index] for index in span} == {pad}
            assert call.prompt_ids.count(pad or -1) == sum(image.placeholder_count for image in call.images)


@pytest.mark.parametrize("graph", ["direct", "blind", "monologue:looks=2"])
def test_the_oracle_answers_in_the_other_graphs_too(tmp_path: Path, graph: str) -> None:
    roles = {"direct": ["answerer"], "blind": ["questioner"]}.get(graph, ["questioner", "answerer"])
    summary = play(graph, problems(6, "near"), {role: oracles()[role] for role in roles}, tmp_path / "run")
    assert summary.score().accuracy == 1


def test_fixed_looks_force_the_kind_of_each_action_by_its_first_token(tmp_path: Path) -> None:
    seats = {"questioner": scripted(lambda request: "red" if request.text.endswith("<conclude>") else "where is it ?")}
    summary = play("monologue:looks=3", problems(2), {**seats, "answerer": scripted(lambda request: "b2")}, tmp_path / "run")
    assert [episode.answer for episode in summary.episodes] == ["red", "red"]
    asked = [json.loads(call.action or "")["kind"] for call in calls(tmp_path / "run")[0] if call.role == "questioner"]
    assert asked == ["look", "look", "look", "conclude"]


def test_a_caption_is_made_without_the_question_and_concluded_from(tmp_path: Path) -> None:
    problem = problems(1)[0]
    answerer = ScriptedBackend(lambda request: "a1 small solid red circle ,", tiny_tokenizer())
    questioner = ScriptedBackend(lambda request: problem.choices[0], tiny_tokenizer())
    seats = {"questioner": Policy(questioner, CODEC), "answerer": Policy(answerer, CODEC)}
    assert play("caption", [problem], seats, tmp_path / "run").episodes[0].answer == problem.choices[0]
    assert problem.question not in answerer.requests[0].text
    assert questioner.requests[0].text.startswith("<bos> <user> a1 small solid red circle , " + problem.question.split()[0])
    assert questioner.requests[0].text.endswith("<assistant> <conclude>")


def test_a_group_shares_the_pictures_of_its_problem(tmp_path: Path) -> None:
    painted: Counter[str] = Counter()

    def watched(problem: Problem) -> Problem:
        def paint() -> Image:
            painted[problem.id] += 1
            return problem.pictures[0]()

        return replace(problem, pictures=(paint,))

    some = [watched(problem) for problem in problems(3)]
    assert play("monologue", some, oracles(), tmp_path / "run", samples=4, progress=False).score().accuracy == 1.0
    assert painted == {problem.id: 1 for problem in some} and all(check.ok for check in verify(tmp_path / "run"))


def test_a_reply_that_does_not_parse_is_recorded_corrected_and_survived(tmp_path: Path) -> None:
    replies = iter(["b2", "<look> <look>", "<look> where is it ?", "<conclude> red"])
    seats = {"questioner": scripted(lambda request: next(replies)), "answerer": scripted(lambda request: "<look> b2")}
    summary = play("monologue", problems(1), seats, tmp_path / "run")
    assert summary.episodes[0].answer == "red"
    episode = calls(tmp_path / "run")[0]
    faults = [call.parse_error is not None for call in episode]
    assert faults == [True, True, False, True, False]
    assert [call.edge for call in episode] == ["correct", "correct", "look", "correct", "conclude"]
    heard = CODEC.text(episode[-1].prompt_ids)
    assert heard.count("please look or answer again") == 2 and heard.count("no answer , please look again") == 1


def test_a_spent_budget_ends_the_episode_well_without_an_answer(tmp_path: Path) -> None:
    seats = {"questioner": scripted(lambda request: "<look> where is it ?"), "answerer": scripted(lambda request: "b2")}
    summary = play("monologue", problems(2), seats, tmp_path / "run", max_turns=3)
    assert [(e.status, e.answer, e.score, e.turns) for e in summary.episodes] == [("ok", None, 0.0, 5)] * 2
    ends = [episode.end for episode in RunReader(tmp_path / "run").episodes()]
    assert all(end is not None and end.status == "ok" and end.answer is None for end in ends)
    assert [e[-1].edge for e in calls(tmp_path / "run")] == ["out_of_turns"] * 2


def test_each_finished_episode_carries_its_score(tmp_path: Path) -> None:
    play("blind", problems(4), {"questioner": scripted(lambda request: "red")}, tmp_path / "run")
    for episode in RunReader(tmp_path / "run").episodes():
        (score,) = [note for note in episode.annotations if note.name == "exact_match"]
        gold = episode.start.choices[episode.start.gold or 0]
        assert score.value == float(gold == "red") and (score.scope, score.source) == ("episode", "task:shapes")


def failing(words: str) -> Policy:
    def reply(request: Request) -> str | Exception:
        return BackendError("the engine is down") if words in request.text else "red"

    return scripted(reply)


def test_a_failed_episode_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    summary = play("blind", problems(20), {"questioner": failing("how many")}, tmp_path / "run")
    broken = sum("how many" in problem.question for problem in problems(20))
    assert 0 < broken < 20 and len(summary.failed) == broken and summary.ok == 20 - broken
    assert all("the engine is down" in (episode.error or "") for episode in summary.failed)
    ends = Counter(episode.end.status for episode in RunReader(tmp_path / "run").episodes() if episode.end)
    assert ends == {"ok": 20 - broken, "failed": broken}


def test_a_resumed_run_neither_repeats_nor_loses_an_episode(tmp_path: Path) -> None:
    first = play("blind", problems(20), {"questioner": failing("how many")}, tmp_path / "run", samples=2)
    second = play("blind", problems(20), {"questioner": failing("nothing like this")}, tmp_path / "run", samples=2)
    assert second.skipped == first.ok and len(second.episodes) == 40 and not second.failed
    ended = [e for e in RunReader(tmp_path / "run").episodes() if e.end and e.end.status == "ok"]
    assert Counter((e.start.problem_id, e.start.sample_index) for e in ended) == {
        (problem.id, sample): 1 for problem in problems(20) for sample in range(2)
    }
    assert {e.start.attempt for e in ended if "how many" in e.start.question} == {1}
    third = play("blind", problems(20), {"questioner": failing("")}, tmp_path / "run", samples=2)
    assert third.skipped == 40 and third.score() == second.score()


async def test_an_interrupted_play_keeps_every_finished_episode(tmp_path: Path) -> None:
    hold = asyncio.Event()

    async def reply(request: Request) -> str:
        if "how many" in request.text:
            await hold.wait()
        return "red"

    seats = {"questioner": scripted(reply)}
    task = asyncio.ensure_future(aplay("blind", problems(20), seats, tmp_path / "run"))
    while len([e for e in RunReader(tmp_path / "run").episodes() if e.end] if (tmp_path / "run/run.json").exists() else []) < 10:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ends = Counter(e.end.status for e in RunReader(tmp_path / "run").episodes() if e.end)
    assert set(ends) == {"ok", "cancelled"} and ends.total() == 20
    hold.set()
    again = await aplay("blind", problems(20), seats, tmp_path / "run")
    assert again.skipped == ends["ok"] and again.ok == 20


INTERRUPTED = """
import asyncio, os, signal, sys
from monologue.agents.codec import TinyCodec
from monologue.agents.policy import Policy
from monologue.backends.scripted import ScriptedBackend
from monologue.backends.tokens import ByteTokenizer
from monologue.graphs.play import play
from monologue.tasks.shapes import Shapes

async def reply(request):
    if request.index == 12:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
    return "red"

seats = {"questioner": Policy(ScriptedBackend(reply), TinyCodec(ByteTokenizer()))}
play("blind", Shapes().problems("train", 20), seats, sys.argv[1], concurrency=3)
"""


def test_ctrl_c_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, str(run)], capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0 and "KeyboardInterrupt" in ended.stderr
    kept = Counter(e.end.status if e.end else "unfinished" for e in RunReader(run).episodes())
    assert kept["ok"] >= 10 and "unfinished" not in kept and kept["cancelled"] >= 1
    again = play("blind", problems(20), {"questioner": scripted(lambda request: "red")}, run)
    assert again.skipped == kept["ok"] and again.ok == 20


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    seats: dict[str, Seat] = {"questioner": oracle(CODEC)}
    play("blind", problems(2), seats, tmp_path / "run", seed=1)
    with pytest.raises(GraphError, match="begun with seed=1"):
        play("blind", problems(2), seats, tmp_path / "run", seed=2)
    with pytest.raises(GraphError, match=r"begun with weight=1.0 \(now 0.5\)"):
        play("blind", problems(2), seats, tmp_path / "run", seed=1, weight=0.5)


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside(tmp_path: Path) -> None:
    def lottery(request: Request) -> dict[str, float]:
        return {"red": 1, "blue": 1, "green": 2}

    def sampled(name: str, seed: int, concurrency: int) -> dict[tuple[str, int], tuple[int, ...]]:
        seats = {"questioner": scripted(lottery)}
        play("blind", problems(10), seats, tmp_path / name, seed=seed, concurrency=concurrency, samples=3)
        return {
            (e.start.problem_id, e.start.sample_index): next(iter(e.calls())).sampled_ids for e in RunReader(tmp_path / name).episodes()
        }

    assert sampled("a", 1, 64) == sampled("b", 1, 2) != sampled("c", 2, 64)


def test_episodes_call_the_engine_concurrently_up_to_the_limit(tmp_path: Path) -> None:
    under_way: list[int] = [0]
    peaks: list[int] = []

    async def reply(request: Request) -> str:
        under_way[0] += 1
        peaks.append(under_way[0])
        await asyncio.sleep(0.005)
        under_way[0] -= 1
        return "red"

    play("blind", problems(12), {"questioner": scripted(reply)}, tmp_path / "run", concurrency=4)
    assert max(peaks) == 4


@given(st.lists(st.sampled_from(["near", "kin", "count"]), min_size=2, max_size=30), st.integers(0, 5))
def test_partners_are_a_derangement_within_families_where_there_are_two(families: list[str], seed: int) -> None:
    made = [Problem(str(i), "t", "q", ("a",), 0, (), family) for i, family in enumerate(families)]
    found = partners(made, seed)
    assert sorted(p.id for p in found.values()) == sorted(p.id for p in made)
    counts = Counter(families)
    odd = sum(number == 1 for number in counts.values())
    for problem in made:
        partner = found[problem.id]
        assert partner.id != problem.id
        assert partner.family == problem.family or odd


def test_shuffled_answers_come_from_the_partners_picture_and_questions(tmp_path: Path) -> None:
    questioner = scripted(lambda request: "<conclude> red" if "<tool>" in request.text else "<look> where is it ?")
    answerer = ScriptedBackend(lambda request: "b2", tiny_tokenizer())
    seats = {"questioner": questioner, "answerer": Policy(answerer, CODEC)}
    mine = {problem.id: problem for problem in problems(8, "near")}
    play("monologue", list(mine.values()), seats, tmp_path / "run", control="shuffle-answers")
    for episode in RunReader(tmp_path / "run").episodes():
        partner = mine[str(episode.start.extra["partner"])]
        (call,) = [call for call in episode.calls() if call.role == "answerer"]
        turns: tuple[OracleTurn, ...] = partner.oracle or ()
        assert partner.id != episode.start.problem_id and turns[0].question in CODEC.text(call.prompt_ids)
        assert "where is it ?" not in CODEC.text(call.prompt_ids)


def test_random_questions_are_asked_about_the_right_picture(tmp_path: Path) -> None:
    chosen = {problem.id: problem for problem in problems(8, "near")}
    seats: dict[str, Seat] = {
        "questioner": scripted(lambda request: "<conclude> red" if "<tool>" in request.text else "<look> where is it ?"),
        "answerer": scripted(lambda request: "b2"),
    }
    shown: dict[str, dict[str, str]] = {}
    for name, control in (("plain", None), ("random", "random-questions")):
        play("monologue", list(chosen.values()), seats, tmp_path / name, control=control)
        for episode in RunReader(tmp_path / name).episodes():
            (call,) = [call for call in episode.calls() if call.role == "answerer"]
            shown.setdefault(name, {})[episode.start.problem_id] = call.images[0].sha256
            if control:
                partner = chosen[str(episode.start.extra["partner"])]
                assert partner.id != episode.start.problem_id and (partner.oracle or ())[0].question in CODEC.text(call.prompt_ids)
    assert shown["plain"] == shown["random"]
    with pytest.raises(GraphError, match="recites"):
        play("monologue", list(chosen.values()), oracles(), tmp_path / "oracle", control="random-questions")


def test_a_caption_is_heard_before_the_first_question_and_belongs_to_the_answerers_stream(tmp_path: Path) -> None:
    heard: list[str] = []

    def ask(request: Request) -> str:
        heard.append(request.text)
        return "red" if request.text.endswith("<conclude>") else "where is it ?"

    answerer = scripted(lambda request: "a red star at b2" if "describe the picture" in request.text.rsplit("<user>", 1)[1] else "b2")
    play("monologue:looks=2,caption=1", problems(1, "near"), {"questioner": scripted(ask), "answerer": answerer}, tmp_path / "run")
    (episode,) = calls(tmp_path / "run")
    assert [call.role[0] for call in episode] == ["a", "q", "a", "q", "a", "q"] and "<user> a red star at b2" in heard[0]
    assert [call.prompt_ids.count(EYES.image_token_id or -1) for call in episode if call.role == "answerer"] == [9, 9, 9], "shown once"
    play("monologue:looks=2,caption=1", problems(2, "near"), {"questioner": oracles()["questioner"], "answerer": answerer}, tmp_path / "q")
    with pytest.raises(GraphError, match="caption must be 0 or 1"):
        play("monologue:caption=2", problems(1), oracles(), tmp_path / "bad")
    summary = play("monologue:caption=1", problems(1), oracles(), tmp_path / "nobody")
    assert "does not know what 'answerer' would say" in str(summary.failed[0].error)


def test_a_wrong_picture_is_another_problems_while_the_question_stays(tmp_path: Path) -> None:
    chosen = problems(8, "near")
    plain, wrong = tmp_path / "plain", tmp_path / "wrong"
    seats: dict[str, Seat] = {
        "questioner": scripted(lambda request: "<conclude> red" if "<tool>" in request.text else "<look> where is it ?"),
        "answerer": scripted(lambda request: "b2"),
    }
    play("monologue", chosen, seats, plain)
    play("monologue", chosen, seats, wrong, control="wrong-picture")

    def seen(run: Path) -> dict[str, str]:
        return {e.start.problem_id: c.images[0].sha256 for e in RunReader(run).episodes() for c in e.calls() if c.role == "answerer"}

    true, false = seen(plain), seen(wrong)
    assert sorted(true.values()) == sorted(false.values()) and all(true[key] != false[key] for key in true)
    assert all("where is it ?" in CODEC.text(c.prompt_ids) for e in calls(wrong) for c in e if c.role == "answerer")


def test_a_builders_tool_is_called_recorded_and_heard(tmp_path: Path) -> None:
    def double(number: int) -> str:
        """Twice the number."""
        return str(2 * number)

    said = iter(['{"name": "double", "arguments": {"number": 21}}', '{"name": "conclude", "arguments": {"answer": "42"}}'])
    tokenizer = chat_tokenizer(PLAIN)
    backend = ScriptedBackend(lambda request: f"<tool_call>\n{next(said)}\n</tool_call>", tokenizer)
    asker = Policy(backend, ChatCodec(tokenizer, 4, "<|image_pad|>"), Sampling(max_tokens=500))
    seats: dict[str, Seat] = {"questioner": asker, "answerer": scripted([])}
    summary = play("monologue", problems(1), seats, tmp_path / "run", tools=[StructuredTool.from_function(double)])
    assert summary.episodes[0].answer == "42", summary.episodes
    assert '"double"' in backend.requests[0].text and "user\n42" in backend.requests[1].text
    (episode,) = RunReader(tmp_path / "run").episodes()
    assert [span.kind for span in episode.spans if span.kind != "episode"].count("tool") == 1


def test_a_look_at_a_region_shows_the_answerer_that_part_enlarged(tmp_path: Path) -> None:
    look = '{"name": "look", "arguments": {"question": "what colour is it ?", "region": [0, 0, 0.5, 0.5]}}'
    said = iter([look, look, '{"name": "conclude", "arguments": {"answer": "red"}}'])
    tokenizer = chat_tokenizer(HERMES)
    asker = ScriptedBackend(lambda request: f"<tool_call>\n{next(said)}\n</tool_call>", tokenizer)
    seats: dict[str, Seat] = {
        "questioner": Policy(asker, ChatCodec(tokenizer), Sampling(max_tokens=500)),
        "answerer": scripted(lambda request: "b2"),
    }
    assert play("monologue", problems(1), seats, tmp_path / "run").episodes[0].answer == "red"
    first, second = (call for call in calls(tmp_path / "run")[0] if call.role == "answerer")
    assert [image.width for image in first.images] == [84, 224] and [image.width for image in second.images] == [84, 224, 224]
    assert [check for check in verify(tmp_path / "run") if not check.ok] == []


def test_progress_is_silent_without_a_terminal_and_drawn_on_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    play("blind", problems(3), {"questioner": oracle(CODEC)}, tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    play("blind", problems(3), {"questioner": oracle(CODEC)}, tmp_path / "drawn")
    assert "accuracy 1.000" in capfd.readouterr().err


def test_bad_options_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="unknown graph 'dance'"):
        play("dance", problems(1), {}, tmp_path)
    with pytest.raises(GraphError, match="needs a policy for answerer"):
        play("monologue", problems(1), {"questioner": oracle(CODEC)}, tmp_path)
    with pytest.raises(GraphError, match="has no seat for answerer"):
        play("blind", problems(1), oracles(), tmp_path)
    with pytest.raises(GraphError, match="no meaning in graph 'blind'"):
        play("blind", problems(2), {"questioner": oracle(CODEC)}, tmp_path, control="wrong-picture")
    with pytest.raises(GraphError, match="two or more"):
        play("monologue", problems(1), oracles(), tmp_path, control="wrong-picture")
    with pytest.raises(GraphError, match="max_turns must be at least 1"):
        play("monologue", problems(1), oracles(), tmp_path, max_turns=0)


def test_dialogues_need_no_tokenizer_library(tmp_path: Path) -> None:
    """The byte tokenizer is enough for scripts, and the whole path is the same."""
    codec, eyes = TinyCodec(ByteTokenizer()), ScriptedBackend([])
    seats: dict[str, Seat] = {"questioner": oracle(codec), "answerer": oracle(codec, eyes)}
    assert play("monologue", problems(10), seats, tmp_path / "run").score().accuracy == 1
    assert codec.parse(codec.action_ids(Reply("b2"))) == Reply("b2")


class Slow:
    """An engine that answers when it is told to, or fails so often before it does."""

    def __init__(self, failures: list[Exception], seconds: float = 0.0) -> None:
        self.engine, self.failures, self.seconds, self.cancelled = (
            ScriptedBackend(lambda request: "red", tiny_tokenizer()),
            failures,
            seconds,
            0,
        )

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Generation:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failures:
            raise self.failures.pop()
        return replace(await self.engine.generate(prompt, sampling), cached_tokens=len(prompt.ids) // 2)


def test_an_episode_past_its_deadline_fails_and_says_so_and_its_call_is_cancelled(tmp_path: Path) -> None:
    engine = Slow([], seconds=60.0)
    summary = play("blind", problems(3), {"questioner": Policy(engine, CODEC)}, tmp_path / "run", deadline=0.2)  # type: ignore[arg-type]
    assert [episode.status for episode in summary.episodes] == ["failed"] * 3 and engine.cancelled == 3
    ends = [episode.end for episode in RunReader(tmp_path / "run").episodes()]
    assert [(end.status, end.error) for end in ends if end] == [
        ("failed", "EpisodeTimeout: the episode did not end within its deadline of 0.2 s")
    ] * 3
    with pytest.raises(GraphError, match="deadline"):
        play("blind", problems(1), {"questioner": Policy(engine, CODEC)}, tmp_path / "no", deadline=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("error", "attempts"), [(BackendUnavailable("gone"), 2), (BackendTimeout("late"), 2), (BackendError("broken"), 1)])
def test_an_episode_whose_engine_was_lost_is_played_again_as_a_whole(tmp_path: Path, error: Exception, attempts: int) -> None:
    seats = {"questioner": Policy(Slow([error]), CODEC)}  # type: ignore[arg-type]
    summary = play("blind", problems(1), seats, tmp_path / "run", retries=1)
    found = [(episode.start.attempt, episode.end.status if episode.end else None) for episode in RunReader(tmp_path / "run").episodes()]
    assert found == [(0, "failed"), (1, "ok")][:attempts] and len(summary.failed) == 2 - attempts
    assert all(check.ok for check in verify(tmp_path / "run")) == (attempts == 2)


def test_the_summary_tells_the_cached_share_of_each_turn_also_after_a_resume(tmp_path: Path) -> None:
    seats = {"questioner": Policy(Slow([]), CODEC)}  # type: ignore[arg-type]
    for _ in range(2):
        summary = play("blind", problems(3), seats, tmp_path / "run")
        calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
        halves = sum(len(call.prompt_ids) // 2 for call in calls)
        assert summary.cached() == {0: halves / sum(len(call.prompt_ids) for call in calls)}
    assert play("monologue", problems(2), oracles(), tmp_path / "other").cached() == {}


def test_a_comma_within_a_graphs_options_does_not_begin_another_graph() -> None:
    assert listed("direct, monologue:looks=2,caption=1 ,blind") == ["direct", "monologue:looks=2,caption=1", "blind"]
    assert listed("monologue:looks=2,monologue") == ["monologue:looks=2", "monologue"]
