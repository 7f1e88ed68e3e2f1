"""What a question was worth is told by the dialogue without it: exactly where all can be enumerated, from real policies where not."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel

from monologue.agents.codec import TinyCodec
from monologue.agents.hindsight import FLOOR, counterfactual, progress
from monologue.agents.policy import Policy
from monologue.backends.scripted import Request, ScriptedBackend
from monologue.graphs.play import play
from monologue.rollouts import Rollouts, seated, source_of
from monologue.tasks.base import Problem
from monologue.tasks.shapes import Shapes
from monologue.traces.store import Episode, RunReader, RunWriter
from monologue.training.credit import COUNTERFACTUAL, assign
from monologue.training.judges import JudgeError, judged, mark, rated
from monologue.training.policies import Learner
from monologue.training.recipe import RecipeError
from monologue.training.reinforce import reinforce
from monologue.training.reinforcement import Reinforcement
from monologue.training.rewards import asked, dangles, give, self_contained
from monologue.training.rows import Row, read_rows
from tests.tokens import tiny_tokenizer

WHERE, MANY = "where is the red star ?", "how many red stars are there ?"
KNOWING, GUESSING = 0.9, 0.25


def seat(say: Any) -> Policy:
    return Policy(ScriptedBackend(say, tiny_tokenizer()), TinyCodec(tiny_tokenizer()))


def asking(*questions: str) -> Policy:
    """Asks these, then concludes rightly with 0.9 where it has heard where the star is, else with 0.25."""

    def say(request: Request) -> str | Mapping[str, float]:
        if request.text.endswith("<conclude>"):
            known = KNOWING if "b2" in request.text.split() else GUESSING
            return {"red": known, "blue": 1 - known}
        heard, mark = request.text.count("<tool>"), "" if request.text.endswith("<look>") else "<look> "
        return mark + questions[heard] if heard < len(questions) else "<conclude> red"

    return seat(say)


def played(run: Path, *questions: str, graph: str = "monologue") -> tuple[Policy, list[Episode]]:
    problem = Problem("p", "t", "what colour is the star ?", ("red", "blue"), 0, ())
    asker = asking(*questions)
    answerer = seat(lambda request: "b2" if request.text.split()[-8:-1] == ["<user>", *WHERE.split()] else "1")
    play(graph, [problem], {"questioner": asker, "answerer": answerer}, run, progress=False)
    return asker, list(RunReader(run).episodes())


def told(reward: Any, episode: Episode) -> dict[str, float]:
    return asyncio.run(reward(episode))


def spans(episode: Episode, role: str = "questioner") -> list[str]:
    return [call.span_id for call in episode.calls() if call.role == role]


@pytest.mark.parametrize("graph", ["monologue", "monologue:looks=3"])
def test_a_useless_question_is_worth_nothing_and_a_needed_one_what_it_brings(tmp_path: Path, graph: str) -> None:
    asker, (episode,) = played(tmp_path / "run", MANY, WHERE, MANY, graph=graph)
    worth, (first, second, third, last) = told(counterfactual(asker), episode), spans(episode)
    assert worth[first] == worth[third] == 0.0 and worth[second] == pytest.approx(KNOWING - GUESSING, abs=1e-9)
    assert [worth[span] for span in spans(episode, "answerer")] == [worth[first], worth[second], worth[third]], "replies share it"
    assert last not in worth
    brought = told(progress(asker), episode)
    assert brought[first] == brought[third] == 0.0 and brought[second] == pytest.approx(math.log(KNOWING / GUESSING), abs=1e-9)
    assert set(brought) == {first, second, third}


def test_what_was_asked_twice_is_missed_by_neither(tmp_path: Path) -> None:
    asker, (episode,) = played(tmp_path / "run", WHERE, WHERE)
    worth, brought = told(counterfactual(asker), episode), told(progress(asker), episode)
    assert [worth[span] for span in spans(episode)[:2]] == [0.0, 0.0]
    assert [brought[span] > 0 for span in spans(episode)[:2]] == [True, False]


def test_nobody_who_knows_the_right_answer_nothing_to_tell(tmp_path: Path) -> None:
    problem = Problem("p", "own", "what colour is the star ?", ("red", "blue"), None, ())
    asker = asking(MANY)
    play("monologue", [problem], {"questioner": asker, "answerer": seat(lambda request: "1")}, tmp_path / "run", progress=False)
    (episode,) = RunReader(tmp_path / "run").episodes()
    assert told(progress(asker), episode) is None and told(counterfactual(asker), episode) is None


def test_the_mean_over_all_dialogues_is_the_exact_policy_gradient(tmp_path: Path) -> None:
    """One question out of two with probability p and 1 - p: dJ/dlogit = p (1 - p) (0.9 - 0.25), and no sampling is needed to see it."""
    gradient, p = 0.0, 0.3
    for question, chance, slope in ((WHERE, p, 1 - p), (MANY, 1 - p, -p)):
        run = tmp_path / question.split()[0]
        asker, _ = played(run, question)
        pen = RunWriter(run, resume=True)
        assert give(RunReader(run), pen, {COUNTERFACTUAL: (counterfactual(asker), 0.0)}) == 2
        pen.close()
        rows = [row for row in read_rows(run, ["questioner"])]
        found = assign(rows, "counterfactual").advantages
        gradient += chance * slope * found[rows[0].pieces[0].span_id]
    assert gradient == pytest.approx(p * (1 - p) * (KNOWING - GUESSING), abs=1e-7)


def notes(row: Row, name: str) -> dict[str | None, tuple[float | None, float]]:
    return {note.span_id: (note.value, note.weight) for note in row.rewards if note.name == name}


def test_a_training_plays_tells_and_credits_by_it(tmp_path: Path) -> None:
    weights = {"progress": 0.1, "asked": -0.05, "self_contained": 0.01}
    settings: dict[str, Any] = {"problems": 3, "samples": 3, "temperature": 2.0, "max_tokens": 16, "max_turns": 4, "iterations": 2}
    recipe = Reinforcement.read({**settings, "credit": COUNTERFACTUAL, "rewards": weights, "families": "near", "guards": {"entropy": None}})
    learners = {"questioner": Learner.open(source_of(recipe, "questioner"))}
    lines = reinforce(recipe, tmp_path, learners, Rollouts(recipe, Shapes(["near"]), seated(recipe)))
    assert len(lines) == 2
    tried = 0
    for row in read_rows(tmp_path, ["questioner"]):
        for name, weight in weights.items():
            assert all(one[1] == weight for one in notes(row, name).values())
        worth, advantages = notes(row, COUNTERFACTUAL), notes(row, "advantage")
        for piece in row.pieces:
            if piece.span_id in worth:
                tried += 1
                here = [note for note in row.rewards if note.span_id == piece.span_id and note.name in weights]
                value = (worth[piece.span_id][0] or 0.0) + sum(note.weight * (note.value or 0.0) for note in here)
                assert advantages[piece.span_id][0] == pytest.approx(value) and worth[piece.span_id][1] == 0.0
                assert -1 <= (worth[piece.span_id][0] or 0.0) <= 1
        risen = [value or 0.0 for value, _ in notes(row, "progress").values()]
        assert abs(sum(risen)) <= -FLOOR, "it telescopes, so no dialogue earns more than the way from the floor to certainty"
    assert tried > 9, "questions were asked"


def test_credit_by_absence_needs_somebody_to_have_tried(tmp_path: Path) -> None:
    played(tmp_path / "run", WHERE)
    with pytest.raises(ValueError, match="nobody has left out a question"):
        assign(list(read_rows(tmp_path / "run")), "counterfactual")
    for settings, word in (
        ({"credit": "counterfactual", "objective": {"name": "ppo"}}, "by its critic"),
        ({"runs": ["x"], "rewards": {"asked": -1.0}}, "belong to playing"),
        ({"rewards": {"judge": 0.1}}, "belong together"),
        ({"judge": "openai:x"}, "belong together"),
    ):
        with pytest.raises(RecipeError, match=word):
            Reinforcement.read(settings)
    with pytest.raises(RecipeError, match="unknown rewards progress"):
        reinforce(Reinforcement(rewards={"progress": 1.0}), "/nowhere", {})


@pytest.mark.parametrize(
    ("question", "leans"),
    [
        ("where is the red star ?", False),
        ("is there a blue circle ?", False),
        ("how many objects have the colour red ?", False),
        ("is the dog licking its paw ?", False),
        ("What does the man that stands left hold?", False),
        ("what is at b3 ?", False),
        ("what colour is it ?", True),
        ("What is to the left of it?", True),
        ("how many of them are red ?", True),
        ("is the other one blue ?", True),
        ("has b2 the same ?", True),
        ("and at b3 ?", True),
        ("what is this?", True),
        ("Is this man tall?", False),
    ],
)
def test_a_question_leans_on_others_where_its_words_point_out_of_it(question: str, leans: bool) -> None:
    assert dangles(question) is leans


def test_oracles_questions_are_self_contained_and_priced_where_they_stand(tmp_path: Path) -> None:
    _, (episode,) = played(tmp_path / "run", WHERE, "how many are there ?")
    assert all(not dangles(turn.question) for problem in Shapes().problems("train", 40) for turn in problem.oracle or ())
    assert list(self_contained(episode).values()) == [1.0, 1.0] and asked(episode) == dict.fromkeys(spans(episode)[:2], 1.0)


def test_any_chat_model_judges_and_a_reply_without_a_mark_is_an_error(tmp_path: Path) -> None:
    played(tmp_path / "run", WHERE)
    pen = RunWriter(tmp_path / "run", resume=True)
    judge = judged(rated(FakeListChatModel(responses=["7", "Ten."])))
    assert give(RunReader(tmp_path / "run"), pen, {"judge": (judge, 0.5), "plain": (judged(lambda q, d, a: float(a == "red")), 1.0)}) == 2
    with pytest.raises(JudgeError, match=r"'Ten\.'"):
        give(RunReader(tmp_path / "run"), pen, {"again": (judge, 0.5)})
    pen.close()
    (found,) = read_rows(tmp_path / "run", ["questioner"])
    assert notes(found, "judge") == {None: (0.7, 0.5)} and notes(found, "plain") == {None: (1.0, 1.0)}
    assert [mark(reply) for reply in ("10", "I say 3.", "mark: 8/10", "0")] == [1.0, 0.3, 0.8, 0.0]
    for reply in ("", "seven", "11", "3.5", "-2"):
        with pytest.raises(JudgeError):
            mark(reply)
