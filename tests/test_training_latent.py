"""Progressive internalisation: what is learned at each stage, which gradients reach whom, and a resume that changes nothing."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from monologue.backends.base import BackendError
from monologue.backends.checkpoints import Checkpoint, open_checkpoint
from monologue.backends.inputs import Inputs
from monologue.backends.latent import Habit
from monologue.backends.perception.ivtlr import LatentReasoner
from monologue.backends.perception.modes import OURS
from monologue.backends.perception.prompts import prompts
from monologue.cards import validated
from monologue.cli import main
from monologue.commands import named_task
from monologue.tasks.hops import VOCABULARY, Hops
from monologue.traces.store import RunReader, RunWriter
from monologue.training.claims import spend, spent
from monologue.training.internalise import Lesson, Objective, internalisation, left, lesson
from monologue.training.latent import Latent, endless, internalise
from monologue.training.rationales import RationaleError, of_problem, of_run
from monologue.training.recipe import RecipeError, read_recipe
from monologue.training.starter.make import save
from monologue.training.starter.models import build_image_processor, build_speaker, build_tokenizer
from monologue.voices import lessons_of, voice_of

TASK = Hops()
FAST: dict[str, Any] = {"task": "hops", "settings": {"k": 2}, "steps": [3, 3, 3], "batch": 4, "lr": 1e-3, "save_every": 4, "partial": True}


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained."""
    folder, tokenizer = tmp_path_factory.mktemp("speaker"), build_tokenizer(VOCABULARY)
    save(build_speaker(0, tokenizer), tokenizer, folder, build_image_processor(112, 84))
    return folder


@pytest.fixture(scope="module")
def opened(speaker: Path) -> Checkpoint:
    return open_checkpoint(str(speaker), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def lessons(opened: Checkpoint) -> list[Lesson]:
    inputs = Inputs(opened)
    return [lesson(of_problem(TASK.problem("train", index)), voice_of(opened, inputs), inputs) for index in range(4)]


def trained(recipe: Latent, speaker: Path, out: Path, dies_after: int | None = None, **more: Any) -> list[dict[str, Any]]:
    """A training on the oracle's monologues; ``dies_after`` so many lessons."""
    checkpoint = open_checkpoint(str(speaker), device="cpu", dtype=torch.float32)
    whole = lessons_of(recipe, checkpoint, named_task)
    given = 0

    def dying(index: int) -> Lesson:
        nonlocal given
        given += 1
        if dies_after is not None and given > dies_after:
            raise KeyboardInterrupt
        return whole(index)

    return internalise(recipe, checkpoint, dying, out, **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_a_lesson_says_the_dialogue_step_by_step_and_then_the_answer(opened: Checkpoint, lessons: list[Lesson]) -> None:
    problem, one, say = TASK.problem("train", 2), lessons[2], opened.tokenizer.decode
    assert problem.oracle is not None and problem.gold is not None
    assert [say(step) for step in one.steps] == [f"{turn.question} {turn.reply}" for turn in problem.oracle]
    assert [say([gist]) for gist in one.gists] == [turn.reply for turn in problem.oracle]
    assert say(one.left(len(one.steps))) == say(one.ending) == f"{problem.choices[problem.gold]} <eos>"
    assert say(one.left(1)).startswith(problem.oracle[1].question)


def test_replies_alone_leave_the_questions_out(opened: Checkpoint, speaker: Path, lessons: list[Lesson]) -> None:
    quiet = lessons_of(Latent.read({**FAST, "words": "replies"}), opened, named_task)(2)
    assert [opened.tokenizer.decode(step) for step in quiet.steps] == [turn.reply for turn in TASK.problem("train", 2).oracle or ()]
    assert (quiet.asked.ids, quiet.gists, quiet.ending) == (lessons[2].asked.ids, lessons[2].gists, lessons[2].ending)


def test_the_prompt_is_that_of_graph_direct(opened: Checkpoint, lessons: list[Lesson]) -> None:
    words = opened.tokenizer.decode(lessons[0].asked.ids)
    assert words.startswith("<bos> <user> <|vision_start|>") and words.endswith("<choice> grey <assistant>")
    assert lessons[0].asked.ids.count(Inputs(opened).image_token_id or -1) == 12


def test_what_is_left_is_padded_on_the_right_where_rows_differ(lessons: list[Lesson]) -> None:
    ids, valid = left(lessons, [0, 1, 2, 5])
    assert valid.sum(1).tolist() == [len(one.left(n)) for one, n in zip(lessons, [0, 1, 2, 5], strict=True)]
    assert ids[3, :2].tolist() == list(lessons[3].ending)


def test_stage_zero_is_plain_cross_entropy_on_everything_said(opened: Checkpoint, lessons: list[Lesson]) -> None:
    one, model = lessons[0], opened.model
    reasoner = LatentReasoner(model, OURS)
    lost = internalisation(reasoner, prompts(model, [one.asked]), [one], 0, Objective(), 0)
    ids = torch.tensor([[*one.asked.ids, *one.left(0)]])
    kinds = (ids == model.config.image_token_id).int()
    grids, positions = one.asked.grids, model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=one.asked.grids)[0]
    out = model(input_ids=ids, pixel_values=one.asked.pixels, image_grid_thw=grids, position_ids=positions, mm_token_type_ids=kinds)
    start = len(one.asked.ids)
    wanted = torch.nn.functional.cross_entropy(out.logits[0, start - 1 : -1], ids[0, start:])
    torch.testing.assert_close(lost.words, wanted, atol=1e-5, rtol=1e-5)
    assert lost.anchor is None and lost.stop is None


def test_a_batch_of_lessons_loses_what_each_loses_alone(opened: Checkpoint, lessons: list[Lesson]) -> None:
    """Words of all rows are averaged together, so rows count by their length."""
    reasoner = LatentReasoner(opened.model, dataclasses.replace(OURS, k=2))
    together = internalisation(reasoner, prompts(opened.model, [one.asked for one in lessons]), lessons, 2, Objective(), 0)
    alone = [internalisation(reasoner, prompts(opened.model, [one.asked]), [one], 2, Objective(), 0).words for one in lessons]
    sizes = torch.tensor([float(len(one.left(2))) for one in lessons])
    torch.testing.assert_close(together.words, (torch.stack(alone) * sizes).sum() / sizes.sum(), atol=1e-5, rtol=1e-5)


def gradient(opened: Checkpoint, lessons: list[Lesson], objective: Objective, **settings: Any) -> float:
    """Of the first state's producer: the prompt's last embedding, which only states see."""
    model = opened.model.requires_grad_(True)
    given = prompts(model, [one.asked for one in lessons])
    embeds = given.embeds.detach().requires_grad_(True)
    reasoner = LatentReasoner(model, dataclasses.replace(OURS, patches="none", **settings))
    lost = internalisation(reasoner, dataclasses.replace(given, embeds=embeds), lessons, 3, objective, 0)
    only = lost.anchor if lost.anchor is not None else lost.words
    (found,) = torch.autograd.grad(only, embeds)
    model.requires_grad_(False)
    return float(found.abs().max())


def test_an_anchor_reaches_the_states_that_detached_words_do_not_train(opened: Checkpoint, lessons: list[Lesson]) -> None:
    model = opened.model.requires_grad_(True)
    given = prompts(model, [one.asked for one in lessons])
    reasoner = LatentReasoner(model, dataclasses.replace(OURS, patches="none", gradients="detached"))
    thoughts = reasoner.think(given, 2)
    assert thoughts.states.requires_grad and not thoughts.fed.requires_grad
    lost = internalisation(reasoner, given, lessons, 2, Objective(anchor=1.0), 0)
    assert lost.anchor is not None
    torch.testing.assert_close(lost.total(Objective(anchor=2.0)), lost.words + 2 * lost.anchor)
    model.requires_grad_(False)
    assert gradient(opened, lessons, Objective(anchor=1.0), gradients="detached") > 0


def test_a_loss_on_looks_is_that_of_the_shares_which_needed_patches_have_in_the_attention(
    opened: Checkpoint, lessons: list[Lesson]
) -> None:
    mode = dataclasses.replace(OURS, k=1, choice="through")
    known = [dataclasses.replace(one, chosen=((3,), (1, 2))) for one in lessons]
    assert not any(one.chosen for one in lessons)
    given = prompts(opened.model, [one.asked for one in known])
    opened.model.requires_grad_(True)
    reasoner = LatentReasoner(opened.model, mode)
    lost = internalisation(reasoner, given, known, 2, Objective(looks=0.5), 0)
    scores = reasoner.think(given, 2).scores
    assert scores is not None and lost.looks is not None
    logs = (scores / scores.sum(-1, keepdim=True)).log()
    torch.testing.assert_close(lost.looks, -torch.cat([logs[:, 0, [3]], logs[:, 1, [1, 2]]], dim=1).mean())
    torch.testing.assert_close(lost.total(Objective(looks=0.5)), lost.words + lost.looks / 2)
    weight = opened.model.model.language_model.layers[0].self_attn.q_proj.weight
    (grad,) = torch.autograd.grad(lost.looks, [weight])
    assert float(grad.abs().max()) > 0
    opened.model.requires_grad_(False)
    for wrong, taught in ((lessons, mode), (known, dataclasses.replace(mode, choice="hard"))):
        with pytest.raises(ValueError, match="say which patches"):
            internalisation(LatentReasoner(opened.model, taught), given, wrong, 2, Objective(looks=0.5), 0)


def test_a_learned_stop_thinks_once_a_step_and_asks_every_state_to_go_on(opened: Checkpoint, lessons: list[Lesson]) -> None:
    think = int(opened.tokenizer.convert_tokens_to_ids("<because>"))
    objective = Objective(anchor=1.0, think=think)
    assert objective.latents(lessons, 4) == [2, 3, 4, 4] and Objective().latents(lessons, 4) == [4] * 4
    reasoner = LatentReasoner(opened.model, dataclasses.replace(OURS, k=1))
    given = prompts(opened.model, [one.asked for one in lessons])
    lost = internalisation(reasoner, given, lessons, 4, objective, 0)
    thoughts = reasoner.think(given, [2, 3, 4, 4])
    said = reasoner.say(thoughts.states).log_softmax(-1)[..., think]
    counted = torch.arange(4) < torch.tensor([[2], [3], [4], [4]])
    assert lost.stop is not None
    torch.testing.assert_close(lost.stop, -said[counted].mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(speaker: Path, tmp_path: Path, optimizer: str) -> None:
    recipe = Latent.read({**FAST, "optimizer": optimizer})
    whole = trained(recipe, speaker, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, speaker, tmp_path / "killed", dies_after=6 * recipe.batch)
    assert trained(recipe, speaker, tmp_path / "killed", resume=True) == whole
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "whole" / "curve.jsonl").read_text() == (tmp_path / "killed" / "curve.jsonl").read_text()


def test_processor_seconds_are_those_of_all_lives(speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed life noted is there for the next one, and for the card; a training that begins anew begins at nothing."""
    recipe, now = Latent.read(FAST), iter(range(0, 100_000, 1000))
    with monkeypatch.context() as clock:
        clock.setattr("monologue.training.latent.time.process_time", lambda: float(next(now)))
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, speaker, tmp_path / "out", dies_after=6 * recipe.batch)
        assert spent(tmp_path / "out") == 1000.0, "noted at the end of its first stage"
        trained(recipe, speaker, tmp_path / "out", resume=True)
        assert spent(tmp_path / "out") == 1000.0 + 3000.0, "at the ends of two more, and of all"
    told = tmp_path / "recipe.toml"
    told.write_text(f'task = "hops"\nmodel = "{speaker}"\nsteps = [1, 1]\nbatch = 2\npartial = true\nexamined = 2\n')
    for noted, words in ((0, []), (50_000, ["--resume"])):
        if noted:
            spend(float(noted), tmp_path / "card")
        assert main(["train", "latent", str(told), "--out", str(tmp_path / "card"), *words]) == 0
        assert noted < json.loads((tmp_path / "card" / "card.json").read_text())["cpu_seconds"] < noted + 50_000


def test_training_moves_the_language_model_and_leaves_the_tower(speaker: Path, tmp_path: Path) -> None:
    trained(Latent.read({**FAST, "steps": [2, 2]}), speaker, tmp_path / "out")
    before = {name: value.float() for name, value in weights(speaker).items()}
    after = weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name for name in moved)
    habit = Habit.load(tmp_path / "out")
    assert habit.steps == 1 and habit.mode.k == 2 and habit.think is None
    with pytest.raises(BackendError, match=r"latent\.json"):
        Habit.load(speaker)


def test_stages_follow_one_another_each_with_its_own_warm_up() -> None:
    recipe = Latent.read({**FAST, "steps": [30, 40], "warmup": 10})
    assert [recipe.stage(step) for step in (0, 29, 30, 69)] == [(0, 0), (0, 29), (1, 0), (1, 39)]
    assert recipe.rate(0) == recipe.rate(30) == pytest.approx(0.1) and recipe.rate(69) < 0.05 < recipe.rate(45)


def test_a_share_of_batches_rehearses_earlier_stages_and_none_the_ones_left_out() -> None:
    recipe = Latent.read({**FAST, "steps": [100, 0, 300, 400], "rehearsal": 0.4})
    practised = [[recipe.practised(step) for step in range(first, last)] for first, last in ((0, 100), (100, 400), (400, 800))]
    assert set(practised[0]) == {0} and set(practised[1]) == {0, 2} and set(practised[2]) == {0, 2, 3}
    assert 0.3 < sum(stage < 3 for stage in practised[2]) / 400 < 0.5
    assert practised[2] == [recipe.practised(step) for step in range(400, 800)], "a resumed training rehearses the same"
    assert all(recipe.model_copy(update={"rehearsal": 0.0}).practised(step) == recipe.stage(step)[0] for step in range(800))


def test_every_rationale_comes_once_before_any_comes_again() -> None:
    place = endless(5, 3)
    first, second = [place(index) for index in range(5)], [place(index) for index in range(5, 10)]
    assert sorted(first) == sorted(second) == list(range(5)) and first != second
    assert [place(index) for index in range(5)] == first


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"run": "runs/x"}, "either a run or a task"),
        ({"stop": "learned"}, "needs a word"),
        ({"settings": {"order": "sideways"}}, "sideways"),
        ({"settings": {"kk": 2}}, "kk"),
        ({"steps": []}, "steps"),
        ({"task": "m3cot", "words": "replies"}, "neither replies"),
        ({"folder": "somewhere"}, "where the files"),
        ({"task": "", "run": "runs/x", "families": "hop1"}, "families"),
        ({"anchor": 1.0, "steps": [5]}, "of which there are none"),
        ({"looks": 1.0}, "choice='through'"),
        ({"rehearsal": 0.2, "stop": "learned", "think": "<tool>"}, "stop='fixed' only"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Latent.read({**FAST, **change})


def test_a_rationale_longer_than_the_latent_steps_is_refused(speaker: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give 6 entries"):
        trained(Latent.read({**FAST, "partial": False, "batch": 8, "families": "hop4"}), speaker, tmp_path)


def test_a_folder_belongs_to_one_training(speaker: Path, tmp_path: Path) -> None:
    recipe = {**FAST, "steps": [1, 1]}
    with pytest.raises(RecipeError, match="leave --resume out"):
        trained(Latent.read(recipe), speaker, tmp_path, resume=True)
    trained(Latent.read(recipe), speaker, tmp_path)
    with pytest.raises(RecipeError, match="another --out"):
        trained(Latent.read(recipe), speaker, tmp_path)
    with pytest.raises(RecipeError, match="'lr'"):
        trained(Latent.read({**recipe, "lr": 1e-2}), speaker, tmp_path, resume=True)


def test_a_recipe_that_failed_at_once_leaves_its_folder_to_the_mended_one(speaker: Path, tmp_path: Path) -> None:
    recipe = {**FAST, "steps": [1, 1], "families": "hop4"}
    for wrong, told in (({"partial": False, "batch": 1}, "give 6 entries"), ({"frozen": [""]}, "leaves nothing to train")):
        with pytest.raises(RecipeError, match=told):
            trained(Latent.read({**recipe, **wrong}), speaker, tmp_path)
    with pytest.raises(RecipeError, match="gradient_accumulation_steps cannot be given"):
        trained(Latent.read(recipe), speaker, tmp_path, gradient_accumulation_steps=2)
    assert trained(Latent.read(recipe), speaker, tmp_path)


def test_data_that_are_refused_at_a_loss_leave_the_folder_as_it_was(speaker: Path, tmp_path: Path) -> None:
    """The first rationale fits, one in its batch does not; what lay in the folder before stays, and so does what a killed training left."""
    recipe, mended = ({**FAST, "families": "hop2,hop3", "partial": partial} for partial in (False, True))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for out in (tmp_path / "new", tmp_path / "used"):
        with pytest.raises(RecipeError, match="give 4 entries"):
            trained(Latent.read(recipe), speaker, out)
    assert [file.name for file in tmp_path.rglob("*")] == ["used", "notes.txt"], "nothing half-made"
    assert trained(Latent.read(mended), speaker, tmp_path / "new")
    assert trained(Latent.read({**mended, "steps": [1, 1, 1]}), speaker, tmp_path / "used")
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"
    with pytest.raises(KeyboardInterrupt):
        trained(Latent.read(mended), speaker, tmp_path / "killed", dies_after=4)
    assert {file.name for file in (tmp_path / "killed").iterdir()} >= {"recipe.json", "curve.jsonl"}


def test_several_processes_are_refused(speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="expected one process"):
        trained(Latent.read(FAST), speaker, tmp_path)


def test_rationales_that_changed_are_another_training(speaker: Path, tmp_path: Path) -> None:
    run, out, recipe = tmp_path / "run", tmp_path / "out", tmp_path / "recipe.toml"
    words = ["play", "--task", "hops", "--split", "train", "--backend", "scripted", "--out", str(run)]
    assert main([*words, "--n", "3"]) == 0
    recipe.write_text(f'run = "{run}"\nsettings = {{ k = 2 }}\nsteps = [1, 1]\nbatch = 2\nlr = 1e-3\npartial = true\n')
    train = ["train", "latent", str(recipe), "--out", str(out)]
    assert main([*train, "--start", str(tmp_path / "nowhere")]) == 2
    assert main([*train, "--start", str(speaker)]) == 0
    assert json.loads((out / "recipe.json").read_text())["model"] == str(speaker)
    assert main([*train, "--start", str(speaker), "--resume"]) == 0
    assert main([*train, "--resume"]) == 2, "another start"
    pen, found = RunWriter(run, resume=True), next(RunReader(run).episodes())
    for record in (found.start, *found.spans, found.end):
        assert record is not None
        pen.write(record.model_copy(update={"episode_id": "another", "problem_id": "another", "group_id": "another"}))
    assert len(of_run(RunReader(run))) == 4
    assert main([*train, "--start", str(speaker), "--resume"]) == 2


def test_looks_want_a_patch_for_each_part_of_the_picture(speaker: Path) -> None:
    checkpoint = open_checkpoint(str(speaker), device="cpu", dtype=torch.float32)
    problem = of_problem(TASK.problem("train", 0))
    inputs = Inputs(checkpoint)
    assert lesson(problem, voice_of(checkpoint, inputs), inputs, looks=True).chosen
    finer = Inputs(dataclasses.replace(checkpoint, image_processor=build_image_processor(224, 168)))
    with pytest.raises(RationaleError, match="has parts, 12, but this model sees 48"):
        lesson(problem, voice_of(checkpoint, finer), finer, looks=True)
    assert lesson(problem, voice_of(checkpoint, finer), finer).asked.pixels is not None


def test_a_word_that_is_not_one_token_cannot_mean_go_on(speaker: Path, tmp_path: Path) -> None:
    recipe = Latent.read({**FAST, "stop": "learned", "think": "what follows"})
    with pytest.raises(RecipeError, match="one token"):
        trained(recipe, speaker, tmp_path)


def test_a_logged_dialogue_is_the_same_rationale_as_its_oracles_program(speaker: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["play", "--task", "hops", "--split", "train", "--n", "4", "--backend", "scripted", "--out", str(run)]
    assert main(words) == 0
    logged = sorted(of_run(RunReader(run)), key=lambda one: one.question)
    for found, problem in zip(logged, sorted(TASK.problems("train", 4), key=lambda one: one.question), strict=True):
        wanted = of_problem(problem)
        assert (found.question, found.choices, found.steps, found.answer) == (wanted.question, wanted.choices, wanted.steps, wanted.answer)
        assert found.pictures[0]().tobytes() == wanted.pictures[0]().tobytes()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'run = "{run}"\nsettings = {{ k = 2 }}\nsteps = [2, 2]\nbatch = 2\nlr = 1e-3\npartial = true\n')
    assert main(["train", "latent", str(recipe), "--start", str(speaker), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "latent.json").read_text())["steps"] == 1


def test_what_ships_is_rounded_examined_as_it_ships_and_has_a_card(
    speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(
        'task = "hops"\nwords = "replies"\ndtype = "bfloat16"\nexamined = 8\npartial = true\n'
        "steps = [2, 2]\nbatch = 2\nlr = 1e-3\nsettings = { k = 2 }\n"
    )
    assert main(["train", "latent", str(recipe), "--start", str(speaker), "--out", str(out)]) == 0
    card = json.loads((out / "card.json").read_text())
    assert [stage["steps"] for stage in card["stages"]] == [2, 2] and card["command"].endswith(f"--start {speaker}")
    assert set(card["validation"]) == {"all", "hop1", "hop2", "hop3", "hop4"}
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}
    opened, shown = open_checkpoint(str(out), device="cpu", dtype=torch.float32), capsys.readouterr().out
    assert validated(opened, out, TASK, 8) == card["validation"] and "hop4" in shown
    assert shown.endswith(f"play:  monologue play --graph latent --thinker {out} --task hops\n"), "the command plays what it was taught"


def test_the_recipe_in_the_documents_is_the_one_that_ships() -> None:
    text = (Path(__file__).parent.parent / "docs" / "thinkers.md").read_text().partition("```toml\n")[2].partition("```")[0]
    told, shipped = tomllib.loads(text), read_recipe("latent")
    own = {"run", "task", "model", "seed", "dtype"}  # where rationales come from, and what ships
    assert {name: value for name, value in told.items() if name not in own} == {
        name: value for name, value in shipped.items() if name not in own
    }
