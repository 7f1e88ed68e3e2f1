"""Rewards compose and land in the trace; advantages compare episodes, not turns or rows, and are what RLOO says they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from monologue.traces.recorder import Recorder
from monologue.traces.store import RunReader, RunWriter
from monologue.training.credit import Averages, assign, at_turns, write
from monologue.training.judges import judged
from monologue.training.rewards import REWARDS, give
from monologue.training.rows import Row, RowError, read_rows, split

FACTS: dict[str, Any] = {
    **{"policy_id": "p", "trainable": True, "engine": "e", "engine_version": "1", "model": "m", "tokenizer_hash": "t"},
    **{"template_hash": "c", "finish_reason": "stop", "truncated": False, "images": (), "messages": (), "output": "what is it ?"},
    **{"action": '{"kind": "look", "question": "what is it ?"}', "parse_error": None, "cached_tokens": None},
    "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "max_tokens": 8},
}


def record(run: Path, episodes: list[dict[str, Any]], roles: tuple[str, ...] = ("q",)) -> Path:
    """Each episode: problem, reward, turns, and perhaps version, price (turn rewards by number), own (role rewards)."""
    writer = RunWriter(run)
    for number, one in enumerate(episodes):
        facts = {
            "problem_id": one["problem"],
            "task": "t",
            "graph": "g",
            "group_id": one["problem"],
            "question": "?",
            "sample_index": number,
        }
        with Recorder(writer).episode(**facts, choices=("red", "blue"), gold=0) as episode:
            for role in roles:
                ids: tuple[int, ...] = ()
                for turn in range(one["turns"]):
                    with episode.policy(role=role, node="n") as span:
                        said = {"sampled_ids": (turn, 9), "sampled_logprobs": (-1.0, -0.5), "loss_mask": b"\1\1"}
                        version = one.get("version", "0")
                        span.record(**{**FACTS, "weights_version": version, "prompt_ids": (*ids, 1, 2), **said, **one.get("call", {})})
                        ids = (*ids, 1, 2, turn, 9)
                        name = f"{span.span.get_span_context().span_id:016x}"
                    if turn in one.get("price", {}):
                        value = one["price"][turn]
                        episode.annotate(name="price", value=value, weight=0.5, scope="turn", span_id=name, source="s")
            for role, value in one.get("own", {}).items():
                episode.annotate(name="own", value=value, scope="role", role=role, source="s")
            if one["reward"] is not None:
                episode.annotate(name="exact_match", value=one["reward"], source="s")
            episode.finish("red" if one["reward"] else None)
    writer.close()
    return run


def by_episode(rows: list[Row], advantages: dict[str, float]) -> list[list[float]]:
    """Advantages of each episode's calls, episodes in order."""
    order = sorted(rows, key=lambda row: (row.sample_index, row.role, row.number))
    return [[advantages[piece.span_id] for piece in row.pieces] for row in order]


def test_an_episode_is_compared_with_the_others_of_its_problem_whatever_number_of_turns(tmp_path: Path) -> None:
    """RLOO: G/(G-1) (R - mean); five turns weigh as one."""
    rewards, turns = [1.0, 0.0, 0.0, 1.0], [1, 5, 2, 3]
    played = [{"problem": "a", "reward": r, "turns": n} for r, n in zip(rewards, turns, strict=True)]
    others = [{"problem": "b", "reward": 1.0, "turns": 1}, {"problem": "b", "reward": 1.0, "turns": 2}]
    rows = list(read_rows(record(tmp_path / "run", [*played, *others])))
    found = assign(rows)
    for values, reward, count in zip(by_episode(rows, found.advantages), rewards, turns, strict=False):
        assert values == [pytest.approx(4 / 3 * (reward - 0.5), abs=1e-12)] * count
    assert by_episode(rows, found.advantages)[4:] == [[0.0], [0.0, 0.0]]
    assert (found.groups, found.flat, found.alone) == (2, 1, 0)


def test_cutting_rows_moves_no_advantage(tmp_path: Path) -> None:
    played = [{"problem": "a", "reward": float(n % 2), "turns": 3, "price": {1: n * 0.1}} for n in range(4)]
    rows = list(read_rows(record(tmp_path / "run", played)))
    cut = [part for row in rows for part in split(row, 1 + row.sample_index % 2)]
    for kind in ("team", "per_role", "turn"):
        assert assign(cut, kind).advantages == assign(rows, kind).advantages
    assert at_turns(cut) == at_turns(rows)


def test_weights_versions_and_roles_are_groups_of_their_own(tmp_path: Path) -> None:
    played = [{"problem": "a", "reward": float(n % 2), "turns": 1, "version": str(n // 2), "own": {"q": n, "r": -n}} for n in range(4)]
    rows = list(read_rows(record(tmp_path / "run", played, ("q", "r"))))
    team = assign(rows, "per_role", share=1.0)
    own = assign(rows, "per_role", share=0.0)
    assert by_episode(rows, team.advantages) == [[-1.0], [-1.0], [1.0], [1.0]] * 2 and team.groups == 4
    assert by_episode(rows, own.advantages) == [[-1.0], [1.0], [1.0], [-1.0]] * 2
    half = assign(rows, "per_role", share=0.5)
    assert by_episode(rows, half.advantages) == [[-1.0], [0.0], [1.0], [0.0]] * 2


def test_a_turn_is_praised_for_what_was_earned_from_it_on(tmp_path: Path) -> None:
    """Half weight on prices: to go 0.5 * price + discount * later; the outcome comes at the last turn."""
    played = [
        {"problem": "a", "reward": 1.0, "turns": 2, "price": {0: 0.4, 1: -0.2}},
        {"problem": "a", "reward": 0.0, "turns": 3, "price": {0: 0.0}},
    ]
    rows = list(read_rows(record(tmp_path / "run", played)))
    found = assign(rows, "turn", discount=0.5)
    first, second = 0.2 + 0.5 * (1.0 - 0.1), 1.0 - 0.1
    ours, theirs = by_episode(rows, found.advantages)
    assert ours == pytest.approx([first, second]) and theirs[:2] == pytest.approx([-first, -second])
    assert theirs[2] == 0.0 and found.alone == 1, "nobody else had a third turn, and the first of its kind teaches nothing"
    assert sum(at_turns(rows).values()) == pytest.approx(1.0 + 0.2 - 0.1)


def test_who_has_no_sibling_is_compared_with_what_was_before(tmp_path: Path) -> None:
    played = [{"problem": f"p{n}", "reward": reward, "turns": 2} for n, reward in enumerate([1.0, 0.0, 1.0])]
    rows, averages = list(read_rows(record(tmp_path / "run", played))), Averages()
    found = assign(rows, averages=averages)
    assert by_episode(rows, found.advantages) == [[0.0, 0.0], [-1.0, -1.0], [pytest.approx(1 - 0.95)] * 2]
    assert averages.means == {"q": pytest.approx(0.95 * 0.95 + 0.05)} and found.alone == 3


def test_options_that_a_kind_does_not_know_and_missing_rewards_are_refused(tmp_path: Path) -> None:
    rows = list(read_rows(record(tmp_path / "run", [{"problem": "a", "reward": None, "turns": 1}])))
    with pytest.raises(ValueError, match="expected a reward of episode"):
        assign(rows)
    with pytest.raises(ValueError, match="share belongs"):
        assign(rows, "team", share=0.5)
    with pytest.raises(ValueError, match="discount belongs"):
        assign(rows, "per_role", discount=0.5)


def test_a_reward_that_is_no_number_is_refused(tmp_path: Path) -> None:
    run = record(tmp_path / "run", [{"problem": "a", "reward": 1.0, "turns": 1}])
    with pytest.raises(RowError, match="a finite number from the reward 'broken', got nan for episode"):
        give(RunReader(run), RunWriter(run, resume=True, name="judge"), {"broken": (lambda episode: math.nan, 1.0)})


def test_rewards_land_in_the_trace_once_with_name_and_weight_and_count(tmp_path: Path) -> None:
    run = record(
        tmp_path / "run",
        [
            {"problem": "a", "reward": 1.0, "turns": 2},
            {"problem": "a", "reward": 0.0, "turns": 3, "call": {"action": None, "parse_error": "no action", "output": "?"}},
        ],
    )
    pen = RunWriter(run, resume=True, name="judge")
    wanted = {name: (REWARDS[name], weight) for name, weight in (("questions", -0.1), ("well_formed", 0.01), ("repeats", -1.0))}
    wanted["judge"] = (judged(lambda question, dialogue, answer: len(dialogue.splitlines()) + (answer == "red")), 2.0)
    assert give(RunReader(run), pen, wanted) == 2 * 3 + 2 + 3
    assert give(RunReader(run), pen, wanted) == 0
    rows = list(read_rows(run))
    assert rows[0].reward("questions") == 2.0 and rows[1].reward("questions") == 0.0 and rows[0].reward("repeats") == 1.0
    sums = [math.fsum(at_turns([row]).values()) for row in rows]
    assert sums == pytest.approx([1 - 0.2 + 0.02 - 1.0 + 2.0 * 3, 0 + 0 + 0 - 0 + 2.0 * 3])
    assert {(note.name, note.weight, note.scope) for note in rows[0].rewards if note.source == "reward"} == {
        ("questions", -0.1, "episode"),
        ("well_formed", 0.01, "turn"),
        ("repeats", -1.0, "episode"),
        ("judge", 2.0, "episode"),
    }
    found = assign(rows).advantages
    write(pen, rows, found, "credit:team")
    again = list(read_rows(run))
    notes = {note.span_id: note.value for row in again for note in row.rewards if note.name == "advantage"}
    assert notes == found and assign(again).advantages == found, "advantages are no rewards"
    write(pen, again, found, "credit:team")
    assert sum(len(row.rewards) for row in read_rows(run)) == sum(len(row.rewards) for row in again)
    pen.close()
