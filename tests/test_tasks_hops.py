"""The hops world: rings that must be walked, pictures that say nothing else, splits that never meet."""

import itertools
from collections import Counter

import pytest

from monologue.agents.prompts import TINY
from monologue.tasks.base import TaskError, exact_match
from monologue.tasks.hops import CELL, COLOURS, COLUMNS, FAMILIES, LETTERS, ROWS, VOCABULARY, Hops, walk
from monologue.tasks.shapes.task import content_hash

PROBLEMS = list(Hops().problems("train", 400))


def test_the_oracle_walks_from_the_start_to_the_gold_colour() -> None:
    for problem in PROBLEMS:
        cells = {letter: (follows, colour) for letter, follows, colour in problem.extra["cells"]}
        letter = problem.question.split()[-1]
        assert problem.oracle is not None and problem.gold is not None
        *hops, last = problem.oracle
        for turn in hops:
            assert turn.question == f"what follows {letter}"
            letter = turn.reply
            assert letter == cells[turn.question.split()[-1]][0]
        assert last.question == f"what colour is {letter}"
        assert last.reply == cells[letter][1] == problem.choices[problem.gold]
        assert len(hops) == FAMILIES[problem.family] == (problem.hops or 0) - 1


def test_the_arrows_make_one_ring_so_that_no_cell_is_a_likelier_end() -> None:
    for problem in PROBLEMS[:50]:
        follows = {letter: after for letter, after, _ in problem.extra["cells"]}
        letter, seen = "a", set()
        while letter not in seen:
            seen.add(letter)
            letter = follows[letter]
        assert seen == set(LETTERS)
        assert set(Counter(colour for _, _, colour in problem.extra["cells"]).values()) == {2}


def test_gold_is_balanced_over_the_choices() -> None:
    counts = Counter(problem.gold for problem in Hops().problems("train", 3000))
    assert len(counts) == len(COLOURS)
    assert all(abs(count - 500) < 5 * 500**0.5 for count in counts.values())


def test_the_way_names_the_cells_that_must_be_seen() -> None:
    for problem in PROBLEMS[:50]:
        cells = [cell[0] for cell in problem.extra["cells"]]
        assert problem.oracle is not None
        way = [cells[place] for place in problem.extra["way"]]
        assert way[1:] == [turn.reply for turn in problem.oracle[:-1]]


def test_a_cell_is_painted_where_the_board_has_it() -> None:
    problem = PROBLEMS[0]
    picture = problem.pictures[0]()
    assert picture.size == (COLUMNS * CELL, ROWS * CELL)
    for place, (_, _, colour) in enumerate(problem.extra["cells"]):
        corner = (place % COLUMNS * CELL + 2, place // COLUMNS * CELL + 2)
        ground = picture.getpixel(corner)
        assert isinstance(ground, tuple)
        nearest = min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], ground, strict=True)))
        assert nearest == colour


def test_the_same_problem_is_drawn_again_pixel_by_pixel() -> None:
    assert content_hash(Hops().problems("train", 20)) == content_hash(Hops().problems("train", 20))


def test_no_board_of_one_split_is_met_in_another() -> None:
    boards = [{str(problem.extra["cells"]) for problem in Hops().problems(split, 500)} for split in Hops.splits]
    assert all(not one & other for one, other in itertools.combinations(boards, 2))


def test_every_word_that_is_said_is_in_the_vocabulary() -> None:
    for problem in PROBLEMS:
        turns = [f"{turn.question} {turn.reply}" for turn in problem.oracle or ()]
        assert set(" ".join([problem.question, *problem.choices, *turns]).split()) <= set(VOCABULARY)
    assert set(f"{TINY.fault} {TINY.unanswered} {TINY.caption}".split()) <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_families_cut_the_world_and_unknown_ones_are_refused() -> None:
    assert {problem.family for problem in Hops(["hop3"]).problems("test", 4)} == {"hop3"}
    assert {problem.family for problem in Hops().problems("test", 16)} == {"hop1", "hop2", "hop3", "hop4"}, "longer: by name"
    (longest,) = Hops(["hop6"]).problems("test", 1)
    assert len(set(longest.extra["way"])) == 7 == longest.hops
    with pytest.raises(TaskError, match="hop9"):
        Hops(["hop9"])
    with pytest.raises(TaskError, match="dev"):
        Hops().problems("dev")


def test_a_walk_visits_no_cell_twice_and_answers_are_scored_by_word() -> None:
    problem = PROBLEMS[3]
    assert len(set(problem.extra["way"])) == 5
    assert problem.gold is not None
    assert exact_match(problem, problem.choices[problem.gold].upper()) == 1.0
    assert Hops().score(problem, None) == 0.0


def test_walking_all_the_way_round_comes_home() -> None:
    board = PROBLEMS[0].pictures[0].board  # type: ignore[attr-defined]
    assert walk(board, "a", len(LETTERS))[-1].letter == "a"
