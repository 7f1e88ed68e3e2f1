"""The speaker of the hops world: its practice is true, in the codec's layout, and fed to the model as the model feeds itself."""

import random
from pathlib import Path

import pytest
import torch

from monologue.agents import answerer as answerer_seat
from monologue.agents import questioner as questioner_seat
from monologue.agents.codec import TinyCodec
from monologue.agents.messages import Conclude, Look, Reply
from monologue.agents.prompts import TINY
from monologue.tasks.hops import VOCABULARY, Hops, draw_board
from monologue.traces.images import Picture
from monologue.training.recipe import RecipeError
from monologue.training.starter import speaker
from monologue.training.starter.batches import IGNORED, Batch, Words, patches
from monologue.training.starter.fit import Curve, Stage
from monologue.training.starter.make import hops_of
from monologue.training.starter.models import build_image_processor, build_speaker, build_tokenizer

TOKENIZER = build_tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def learner() -> speaker.Speaker:
    return speaker.Speaker(build_speaker(0, TOKENIZER), Words(TOKENIZER))


@pytest.mark.parametrize("index", range(4))
def test_both_seats_practise_in_the_layout_of_the_codec(index: int) -> None:
    codec, problem, words = TinyCodec(TOKENIZER, 12), Hops().problem("train", index), Words(TOKENIZER)
    picture, turns = Picture("", problem.pictures[0]()), problem.oracle or ()
    asked = list(codec.open(questioner_seat.opening(TINY, problem.question, problem.choices)))
    seen: list[int] = []
    for turn in turns:
        asked += [*codec.action_ids(Look(turn.question)), *codec.extend(questioner_seat.reply_heard(turn.reply))]
        opening = codec.extend(answerer_seat.asked(turn.question)) if seen else ()
        seen += opening or codec.open(answerer_seat.opening(TINY, turn.question, [picture]))
        seen += codec.action_ids(Reply(turn.reply))
    asked += codec.action_ids(Conclude(problem.choices[problem.gold or 0]))
    assert words.sequence(speaker.asker(problem))[0] == asked
    assert words.sequence(speaker.seer(problem))[0] == seen


def test_a_drill_says_what_the_board_shows() -> None:
    rng = random.Random(0)
    board = draw_board(rng)
    cells = {cell.letter: cell for cell in board}
    parts = speaker.drill(rng, board, 20)[1:]
    for (question, _), (reply, spoken) in zip(parts[::2], parts[1::2], strict=True):
        cell = cells[question.split()[-1]]
        assert spoken and reply == (cell.follows if "follows" in question else cell.colour)


def test_patches_of_wide_pictures_equal_the_processors_own() -> None:
    images = [problem.pictures[0]() for problem in Hops().problems("train", 2)]
    wanted = build_image_processor(112, 84)(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(patches(images), wanted, atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_the_trainers_forward_pass_is_the_models_own(learner: speaker.Speaker) -> None:
    problem = Hops().problem("train", 3)
    ids, labels = learner.words.batch([speaker.seer(problem)])
    pixels = patches([problem.pictures[0]()])
    logits, _ = learner.spoken(Batch(ids, labels, pixels))
    kinds = (ids == learner.words.table["<|image_pad|>"]).int()
    own = learner.model(input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 6, 8]]), mm_token_type_ids=kinds).logits
    torch.testing.assert_close(logits, own[:, :-1][labels[:, 1:] != IGNORED], atol=1e-4, rtol=1e-4)


def test_a_few_steps_of_each_stage_learn(learner: speaker.Speaker, tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.jsonl")
    pixels, boards = next(speaker.boards("see/9", 16))
    before = learner.see_loss(pixels, boards).item()
    for name in ("see", "drill", "seats"):
        speaker.learn(learner, Stage(name, steps=8, batch=4, turns=4, lr=3e-3), 0, curve, Hops())
    assert learner.see_loss(pixels, boards).item() < 0.95 * before
    found = speaker.examine(learner, 8, Hops())
    assert set(found) == {"cells", "look-ups", "questioner", "answerer"} and all(0 <= value <= 1 for value in found.values())
    with pytest.raises(ValueError, match="sing"):
        speaker.learn(learner, Stage("sing", steps=1, batch=1), 0, curve, Hops())


def test_families_of_a_recipe_are_one_text_and_need_not_be_there() -> None:
    assert hops_of({}).families == Hops().families
    assert hops_of({"families": "hop5,hop6"}).families == ("hop5", "hop6")
    with pytest.raises(RecipeError, match=r"expected families as one text with commas, got \['hop1'\]"):
        hops_of({"families": ["hop1"]})
