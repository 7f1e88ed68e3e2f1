"""What the controls do is what their names say: nothing, everything, or another problem's thoughts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from monologue.backends.checkpoints import Checkpoint, open_checkpoint
from monologue.backends.inputs import Inputs
from monologue.backends.latent import Habit
from monologue.backends.perception.ivtlr import Edits, LatentReasoner
from monologue.backends.perception.modes import OURS, Mode
from monologue.interference import exams_of
from monologue.tasks.hops import VOCABULARY, Hops
from monologue.training import causal
from monologue.training.starter.make import save
from monologue.training.starter.models import build_image_processor, build_speaker, build_tokenizer

MODE = dataclasses.replace(OURS, k=2)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder, tokenizer = tmp_path_factory.mktemp("speaker"), build_tokenizer(VOCABULARY)
    save(build_speaker(1, tokenizer), tokenizer, folder, build_image_processor(112, 84))
    return open_checkpoint(str(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def exams(opened: Checkpoint) -> list[causal.Exam]:
    return exams_of(opened, Inputs(opened), list(Hops(["hop2"]).problems("validation", 70)))


def thinker(opened: Checkpoint, mode: Mode = MODE, steps: int = 3) -> causal.Thinking:
    return causal.Thinking(LatentReasoner(opened.model, mode), Habit(mode, steps), Inputs(opened).banned)


def answers(thinking: causal.Thinking, exam: causal.Exam, **more: Any) -> list[tuple[int, ...]]:
    """What is really said, two words."""
    thoughts = thinking.think(exam, **more)
    logits, said = thinking.reasoner.say(thoughts.last), []
    for _ in range(2):
        said.append(logits.index_fill(-1, torch.tensor(thinking.banned), -torch.inf).argmax(-1))
        logits = thinking.reasoner.hear(thoughts, said[-1])
    return [tuple(pair) for pair in torch.stack(said, dim=1).tolist()]


def wanting(exam: causal.Exam, endings: list[tuple[int, ...]]) -> causal.Exam:
    """The same exam, whose right answers are these."""
    return dataclasses.replace(exam, lessons=[dataclasses.replace(one, ending=end) for one, end in zip(exam.lessons, endings, strict=True)])


@torch.inference_mode()
def test_without_interference_a_thinker_says_what_it_says(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    thinking = thinker(opened)
    own = [wanting(exam, answers(thinking, exam)) for exam in exams]
    rows = {row["control"]: row for row in causal.controls(thinking, own)}
    assert rows["none"] == {"control": "none", "n": 70, "accuracy": 1.0, "stderr": 0.0}
    assert set(rows) == set(causal.CONTROLS)
    assert rows["noise"]["accuracy"] < 1 and rows["pause"]["accuracy"] < 1


@torch.inference_mode()
def test_attention_that_was_taught_to_choose_has_all_controls_too(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    thinking = thinker(opened, dataclasses.replace(MODE, choice="through"))
    assert {row["control"] for row in causal.controls(thinking, exams[:1])} == set(causal.CONTROLS)


@torch.inference_mode()
def test_noise_for_a_step_that_one_problem_alone_takes_is_a_number(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    plain = [causal._plain(thinker(opened).think(exam)) for exam in exams[:1]]
    plain[0].steps[1:] = 2
    drawn = causal._drawn_states("noise", plain, 0)(2, plain[0].fed[:, 2])
    assert bool(drawn.isfinite().all())


@torch.inference_mode()
def test_shuffled_thoughts_are_those_of_the_next_problem(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    thinking, exam = thinker(opened), exams[0]
    own = thinking.think(exam)
    order = [*range(1, len(exam.lessons)), 0]
    edits = Edits(states=lambda step, _: own.fed[order, step], patches=lambda step, _: own.patches[order, step])
    swapped = wanting(exam, answers(thinking, exam, chosen=own.chosen[order], edits=edits))
    (row,) = causal.controls(thinking, [swapped], ["shuffled"])
    assert row["accuracy"] == 1.0 and row["pairs"] < len(exam.lessons)
    own_answers = wanting(exam, answers(thinking, exam))
    (row,) = causal.controls(thinking, [wanting(exam, [swapped.lessons[place - 1].ending for place in range(len(order))])], ["shuffled"])
    assert row["carried"] == 1.0 and causal.controls(thinking, [own_answers], ["none"])[0]["accuracy"] == 1.0


@torch.inference_mode()
def test_random_patches_are_as_many_and_none_twice(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    own = thinker(opened).think(exams[0])
    drawn = causal._drawn(causal._plain(own), exams[0], 0)
    assert drawn.shape == own.chosen.shape and int(drawn.min()) >= 0 and int(drawn.max()) < 12
    assert all(len(set(lane.flatten().tolist())) == lane.numel() for lane in drawn)
    assert not torch.equal(drawn, own.chosen)


@torch.inference_mode()
def test_recall_counts_needed_patches_up_to_their_step(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    thinking = thinker(opened)
    chosen = [thinking.think(exam).chosen for exam in exams]
    last = [[int(row[0, 0]), int(row[0, 1]), int(row[0, 0])] for part in chosen for row in part]
    cut = [exam.given.there.shape[0] for exam in exams]
    known = [dataclasses.replace(exam, needed=last[sum(cut[:i]) : sum(cut[: i + 1])]) for i, exam in enumerate(exams)]
    first, second, third = causal.recall(thinking, known)
    assert first["at"] == first["by"] == 1.0 and first["draw"] == pytest.approx(2 / 12, abs=1e-3)
    assert second["at"] == 0.0 and second["by"] == 1.0 and third["by"] == 1.0


@torch.inference_mode()
def test_a_probe_reads_what_a_state_holds_and_not_what_it_does_not(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 5, (400,), generator=generator)
    holds = torch.nn.functional.one_hot(words, 5).double() @ torch.randn(5, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    assert causal._probe(holds + 0.01 * noise, words.tolist())["accuracy"] == 1.0
    assert causal._probe(noise, words.tolist())["accuracy"] < 0.35
    rows = causal.probes(thinker(opened), exams)
    assert [(row["state"], row["finding"]) for row in rows] == [(i, j) for i in (1, 2, 3) for j in (1, 2, 3)]


def test_pictures_of_lessons_say_which_cells_they_need(exams: list[causal.Exam]) -> None:
    assert all(len(way) == 3 and len(set(way)) == 3 for exam in exams for way in exam.needed)


def test_an_unknown_control_is_refused(opened: Checkpoint, exams: list[causal.Exam]) -> None:
    with pytest.raises(ValueError, match="sleep"):
        causal.controls(thinker(opened), exams, ["sleep"])


def test_the_shares_carry_their_error(tmp_path: Path) -> None:
    assert causal.share([True, False, True, False]) == {"n": 4, "accuracy": 0.5, "stderr": round((0.25 / 3) ** 0.5, 4)}
