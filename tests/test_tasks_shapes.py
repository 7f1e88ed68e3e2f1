"""The shapes world: same seed, same pixels; every program runs; no question gives its answer away; held-out pairs stay held out."""

import itertools
import json
import random
from collections import Counter, defaultdict

import pytest

from monologue.tasks.base import TaskError, by_family, by_hops, exact_match, summarize
from monologue.tasks.shapes import Looks, Shapes, language
from monologue.tasks.shapes.draw import SIDE, paint
from monologue.tasks.shapes.families import FAMILIES, MULTI_HOP
from monologue.tasks.shapes.perception import KINDS, exam, look, practice_scene
from monologue.tasks.shapes.programs import run
from monologue.tasks.shapes.scene import COLOURS, HELD_OUT, SEEN, SHAPES, Thing, draw_scene, neighbour
from monologue.tasks.shapes.task import FROZEN, FROZEN_SIZE, WORLDS, content_hash


def test_same_seed_gives_the_same_problem_and_the_same_pixels() -> None:
    first, again = (list(Shapes().problems("test", 20)) for _ in range(2))
    assert content_hash(iter(first)) == content_hash(iter(again))
    other = list(Shapes().problems("test", 20, seed=1))
    assert content_hash(iter(first)) != content_hash(iter(other))


def test_a_stream_can_be_entered_anywhere() -> None:
    task = Shapes()
    assert list(itertools.islice(task.problems("train"), 40))[33].question == task.problem("train", 33).question


@pytest.mark.parametrize("split", ["train", "combos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_executes_to_gold_with_its_oracle(family: str, split: str) -> None:
    for problem in Shapes([family]).problems(split, 30):
        scene = problem.pictures[0].scene  # type: ignore[attr-defined]
        outcome = run(problem.program, scene)
        assert outcome is not None and outcome.value == problem.choices[problem.gold or 0]
        assert outcome.turns == problem.oracle and len(outcome.turns) == problem.hops
        assert len(set(problem.choices)) == len(problem.choices)


def test_families_cover_one_to_four_hops() -> None:
    hops = {p.family: p.hops for p in Shapes().problems("train", len(FAMILIES))}
    assert len(hops) >= 6 and set(hops.values()) == {1, 2, 3, 4}
    assert all((hops[name] or 0) >= 2 for name in MULTI_HOP)


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_is_even_over_positions_and_ranks(family: str) -> None:
    """Chi-square of where gold stands, and of its rank in sorted order: a reader of questions alone gains nothing."""
    positions: dict[int, Counter[int]] = defaultdict(Counter)
    ranks: dict[int, Counter[int]] = defaultdict(Counter)
    for problem in Shapes([family]).problems("train", 1500, seed=7):
        assert problem.gold is not None
        size = len(problem.choices)
        positions[size][problem.gold] += 1
        ranks[size][sorted(problem.choices).index(problem.choices[problem.gold])] += 1
    for table in (positions, ranks):
        for size, counts in table.items():
            expected = counts.total() / size
            chi = sum((counts[k] - expected) ** 2 / expected for k in range(size))
            assert chi < {2: 13, 3: 16, 4: 19, 5: 21, 6: 23}[size], (family, counts)


def test_training_never_draws_or_names_a_held_out_pair() -> None:
    for problem in Shapes().problems("train", 300):
        drawn = {thing.pair for thing in problem.pictures[0].scene.values()}  # type: ignore[attr-defined]
        assert not drawn & HELD_OUT
        said = " ".join([problem.question, *(turn.question for turn in problem.oracle or ())])
        assert not [pair for pair in HELD_OUT if " ".join(pair) in said]
    assert {c for c, _ in SEEN} == set(COLOURS) and {s for _, s in SEEN} == set(SHAPES)


def test_every_word_is_in_the_vocabulary() -> None:
    words = set(language.VOCABULARY)
    for problem in itertools.chain(Shapes().problems("train", 200), Shapes().problems("combos", 200)):
        turns = [text for turn in problem.oracle or () for text in (turn.question, turn.reply)]
        for text in (problem.question, *problem.choices, *turns):
            assert set(text.split()) <= words, text


@pytest.mark.parametrize("kind", KINDS)
def test_perception_questions_are_true(kind: str) -> None:
    for scene, found in exam(WORLDS["combos"], kind, 50, "truth"):
        again = look(random.Random(0), scene, WORLDS["combos"], kind)
        assert found.kind == kind and (again is None or again.kind == kind)
        if kind == "count":
            noun = found.question.removeprefix("how many ").removesuffix(" are there ?")
            wishes = [{"colour": c} for c in COLOURS] + [{"shape": s} for s in SHAPES]
            wish = next(w for w in wishes if language.noun(w, plural=True) == noun)
            assert int(found.reply) == sum(all(getattr(t, k) == v for k, v in wish.items()) for t in scene.values())


def test_a_picture_depends_on_scene_and_seed_only() -> None:
    scene = practice_scene(random.Random(3))
    assert paint(scene, 5).tobytes() == paint(dict(scene), 5).tobytes() != paint(scene, 6).tobytes()
    assert paint(scene, 5).size == (SIDE, SIDE)


def test_the_board_has_edges() -> None:
    assert neighbour("a1", "above") is None and neighbour("b2", "right of") == "b3" and neighbour("c3", "below") is None


def test_a_program_that_finds_nothing_or_too_much_is_invalid() -> None:
    star = Thing("red", "star", "small", "solid")
    assert run((("where", "colour", "red"),), {"a1": star, "a2": star}) is None
    assert run((("where", "colour", "blue"),), {"a1": star}) is None
    assert run((("cell", "b1"), ("at", "colour")), {"a1": star}) is None


def test_wishes_are_granted() -> None:
    scene = draw_scene(random.Random(0), {"b2": {"colour": "red", "size": "large"}}, count=6)
    assert len(scene) == 6 and (scene["b2"].colour, scene["b2"].size) == ("red", "large")


def test_unknown_splits_and_families_are_refused_by_name() -> None:
    with pytest.raises(TaskError, match=r"'dev'.*train"):
        Shapes().problems("dev", 1)
    with pytest.raises(TaskError, match="'nine'"):
        Shapes(["nine"])


def test_scores_carry_a_standard_error() -> None:
    problems = list(Shapes().problems("test", 40))
    scores = [exact_match(p, p.choices[p.gold or 0].upper() + " ") for p in problems]
    whole = summarize(scores, [0.25] * 40)
    assert (whole.accuracy, whole.stderr, whole.n) == (1.0, 0.0, 40)
    assert sum(one.n for one in by_family(problems, scores).values()) == 40
    hops = by_hops(problems, scores)
    assert hops["multi"].n == 40 - hops["1"].n == sum(hops[name].n for name in ("2", "3", "4"))
    assert summarize([1.0, 0.0], [0.5, 0.5]).stderr == pytest.approx(0.5)


@pytest.mark.parametrize("split", FROZEN)
def test_the_frozen_test_sets_are_what_they_were(split: str) -> None:
    assert content_hash(Shapes().problems(split, FROZEN_SIZE)) == FROZEN[split]


def test_problems_are_plain_enough_to_write_down() -> None:
    problem = Shapes().problem("test", 0)
    json.dumps([problem.id, problem.question, problem.choices, problem.program, problem.extra])


@pytest.mark.parametrize("split", ["test", "combos"])
def test_looks_are_answerable_by_one_of_their_choices(split: str) -> None:
    problems = list(Looks().problems(split, 100))
    assert {p.family for p in problems} == set(KINDS)
    assert all(p.gold is not None and p.oracle and p.choices[p.gold] == p.oracle[0].reply for p in problems)
    assert [p.id for p in problems] == [p.id for p in Looks().problems(split, 100)]
