"""How the starter policies are made: the trainer's shortcuts equal the real thing, and a few steps learn."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from monologue.agents import answerer as answerer_seat
from monologue.agents import questioner as questioner_seat
from monologue.agents.codec import TinyCodec
from monologue.agents.messages import Conclude, Look, Reply
from monologue.agents.prompts import TINY
from monologue.tasks.hops import Hops
from monologue.tasks.shapes import Shapes
from monologue.tasks.shapes.perception import practice_scene
from monologue.traces.images import Picture
from monologue.training import recipe as recipe_file
from monologue.training.starter import batches, card, direct, make, questioner
from monologue.training.starter.answerer import learn
from monologue.training.starter.batches import IGNORED, Batch, Words, interview, patches, picture_words
from monologue.training.starter.fit import Curve, Stage, fit
from monologue.training.starter.models import build_answerer, build_image_processor, build_questioner, build_tokenizer
from monologue.training.starter.sight import Sight


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(build_tokenizer())


@pytest.fixture(scope="module")
def sight(words: Words) -> Sight:
    return Sight(build_answerer(0, build_tokenizer()), words)


def test_patches_of_a_batch_equal_the_processors_own() -> None:
    images = [problem.pictures[0]() for problem in Shapes().problems("train", 3)]
    wanted = build_image_processor()(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(patches(images), wanted, atol=1e-6, rtol=1e-6)


def test_word_lookup_equals_the_tokenizer(words: Words) -> None:
    tokenizer = build_tokenizer()
    for problem in Shapes().problems("combos", 30):
        assert words(problem.question) == tokenizer(problem.question).input_ids
    assert tokenizer("What COLOUR is the star?").input_ids == words("what colour is the star ?")


@pytest.mark.parametrize("family", Shapes().families)
def test_the_trained_layout_of_a_monologue_is_the_codecs(words: Words, family: str) -> None:
    codec = TinyCodec(build_tokenizer())
    problem = Shapes([family]).problem("train", 0)
    ids = list(codec.open(questioner_seat.opening(TINY, problem.question, problem.choices)))
    spoken = [False] * len(ids)
    actions = [Look(turn.question) for turn in problem.oracle or ()]
    for action, turn in zip(actions, problem.oracle or (), strict=True):
        said, heard = codec.action_ids(action), codec.extend(questioner_seat.reply_heard(turn.reply))
        ids, spoken = [*ids, *said, *heard], [*spoken, *[True] * len(said), *[False] * len(heard)]
    said = codec.action_ids(Conclude(problem.choices[problem.gold or 0], problem.explanation))
    trained, labels = words.sequence(questioner.monologue(problem))
    assert trained == [*ids, *said]
    assert [label != IGNORED for label in labels] == [*spoken, *[True] * len(said)]


def test_the_trained_layout_of_a_forced_conclusion_is_the_codecs(words: Words) -> None:
    codec = TinyCodec(build_tokenizer())
    problem = Shapes().problem("train", 2)
    for caption in (None, "b2 small solid red circle ,"):
        opening = codec.open(questioner_seat.opening(TINY, problem.question, problem.choices, caption)) + codec.force("conclude")
        ids, labels = words.sequence(questioner.forced(problem, caption or ""))
        assert tuple(ids[: len(opening)]) == opening and set(labels[: len(opening)]) == {IGNORED}


def test_the_trained_layout_of_an_interview_and_of_one_shot_is_the_codecs(words: Words) -> None:
    codec = TinyCodec(build_tokenizer())
    problem = Shapes().problem("train", 0)
    picture = Picture("0" * 64, problem.pictures[0]())
    first = codec.open(answerer_seat.opening(TINY, "where is the red star ?", [picture]))
    stream = [*first, *codec.action_ids(Reply("b2")), *codec.extend(answerer_seat.asked("what colour is at b3 ?"))]
    trained = f"<bos> <user> {picture_words()} where is the red star ? <assistant> b2 <eos> <user> what colour is at b3 ? <assistant>"
    assert words(trained) == stream
    shot = codec.open(answerer_seat.direct(TINY, problem.question, problem.choices, [picture]))
    assert tuple(words.sequence(direct.one_shot(problem)[:1])[0]) == shot


@torch.no_grad()
def test_the_trainers_forward_pass_is_the_models_own(sight: Sight, words: Words) -> None:
    rng = random.Random(0)
    scenes = [practice_scene(rng) for _ in range(3)]
    rows = [interview(rng, scene, batches.TRAIN, ["at", "where", "count"][: k + 1]) for k, scene in enumerate(scenes)]
    ids, _ = words.batch(rows)
    pixels = patches([batches.paint(scene, 1) for scene in scenes])
    kinds = (ids == words.table["<|image_pad|>"]).int()
    whole = sight.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 6, 6]] * 3),
        mm_token_type_ids=kinds,
    ).logits
    ours = sight.hidden(ids, sight.visual_tokens(pixels)) @ sight.embedding.weight.T
    torch.testing.assert_close(ours, whole, atol=2e-4, rtol=1e-4)


def test_a_few_steps_of_every_stage_lower_the_loss(sight: Sight, tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.jsonl")
    stage = Stage("see", steps=12, batch=4)
    before = sight.see_loss(*next(batches.pictures("see/0", 4))).item()
    learn(sight, [stage], 0, curve)
    assert sight.see_loss(*next(batches.pictures("see/0", 4))).item() < before
    drill = next(batches.drills("probe", sight.words, 8, batches.ALL_DRILLS))
    before = sight.speak_loss(drill).item()
    learn(sight, [Stage("captions", 4, 4), Stage("locate", 4, 4), Stage("drill", 12, 4)], 0, curve)
    assert sight.speak_loss(drill).item() < before
    assert [json.loads(line)["stage"] for line in curve.path.read_text().splitlines()] == ["see", "captions", "locate", "drill"]


def test_the_tower_and_the_words_stand_still_after_see(sight: Sight, tmp_path: Path) -> None:
    still = {name: p.detach().clone() for name, p in sight.model.named_parameters() if ".visual." in name or "embed_tokens" in name}
    learn(sight, [Stage("drill", 2, 2)], 1, Curve(tmp_path / "curve.jsonl"))
    assert len(still) > 10 and all(torch.equal(p, still[name]) for name, p in sight.model.named_parameters() if name in still)


def test_the_questioner_learns_and_replies_carry_no_loss(words: Words, tmp_path: Path) -> None:
    model = build_questioner(0, build_tokenizer())
    probe = next(questioner.practice(words, 4, seed=1))
    before = questioner.imitate(model, probe).item()
    stream = questioner.practice(words, 4, seed=0)
    fit(Stage("imitate", 10, 4), list(model.named_parameters()), stream, lambda b: questioner.imitate(model, b), Curve(tmp_path / "c"))
    assert questioner.imitate(model, probe).item() < before
    changed = Batch(probe.ids, probe.labels.masked_fill(probe.labels != IGNORED, IGNORED), None)
    assert not (changed.labels != IGNORED).any()


def test_same_seed_same_batches(words: Words) -> None:
    first, again = (next(batches.interviews("s", words, 3, 4, {"where": 1.0, "caption": 1.0})) for _ in range(2))
    assert torch.equal(first.ids, again.ids) and first.pixels is not None and again.pixels is not None
    assert torch.equal(first.pixels, again.pixels)


@torch.no_grad()
def test_a_grown_model_says_what_its_seed_said(sight: Sight, words: Words, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    make.round_weights(sight.model)
    make.save(sight.model, tokenizer, tmp_path, build_image_processor())
    grown = Sight(direct.grow(tmp_path, 6, 0, tokenizer), words)
    batch = next(batches.drills("grow", words, 2, batches.CAPTIONS))
    assert batch.pixels is not None
    torch.testing.assert_close(
        sight.spoken(batch, sight.visual_tokens(batch.pixels))[0], grown.spoken(batch, grown.visual_tokens(batch.pixels))[0]
    )
    assert sum(p.numel() for p in grown.model.parameters()) > sum(p.numel() for p in sight.model.parameters())


def test_recipes_are_read_overridden_and_refused_by_name() -> None:
    recipe = recipe_file.override(recipe_file.read_recipe("questioner"), ["seed=7"])
    assert recipe["seed"] == 7 and make.stages_of(recipe)[0].steps > 0
    with pytest.raises(make.RecipeError, match="answerer, direct, direct-plain, imitate, immo, latent, offline, outcome, questioner"):
        recipe_file.read_recipe("nobody")
    with pytest.raises(make.RecipeError, match="speed"):
        recipe_file.override(recipe, ["speed=1"])


def test_direct_without_a_perception_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(make.RecipeError, match="perception checkpoint"):
        make.make(recipe_file.read_recipe("direct"), tmp_path, tmp_path / "nothing")


def test_saving_does_not_touch_the_model_in_training(words: Words, tmp_path: Path) -> None:
    model = build_questioner(3, build_tokenizer())
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    make.save(model, build_tokenizer(), tmp_path, None)
    assert all(torch.equal(value, before[name]) for name, value in [*model.named_parameters(), *model.named_buffers()])


def test_weights_are_rounded_before_they_ship(words: Words, tmp_path: Path) -> None:
    model = build_questioner(3, build_tokenizer())
    make.round_weights(model)
    make.save(model, build_tokenizer(), tmp_path, None)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_model_card_is_what_the_command_makes_of_the_files_beside_it() -> None:
    folder = card.home()
    assert (folder / "README.md").read_text() == card.page(folder)
    assert (folder / "curves.svg").read_text() == card.curves(folder)
    for name in card.POLICIES:
        facts = json.loads((folder / name / "card.json").read_text())
        assert facts["weights_sha256"] == hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()
        assert facts["world_sha256"] == make.world_hash(Hops() if name in ("speaker", "thinker") else Shapes())
