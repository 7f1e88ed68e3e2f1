"""Thought before spoken: latent steps stand in the trace, are replayed to the last bit, and give way to the monologue where unsure."""

import asyncio
import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from monologue.agents.load import codec_for, load_policy
from monologue.agents.policy import Policy
from monologue.backends.base import LATENT, BackendError, Picture, Prompt, Sampling
from monologue.backends.hf import HFBackend
from monologue.backends.latent import Habit
from monologue.backends.perception.modes import OURS, Mode
from monologue.cli import main
from monologue.graphs import latent
from monologue.graphs.oracle import Seat, oracle
from monologue.graphs.play import play
from monologue.graphs.registry import find
from monologue.graphs.state import GraphError
from monologue.interference import show_states
from monologue.tasks.hops import VOCABULARY, Hops
from monologue.traces import names
from monologue.traces.page.detail import detail
from monologue.traces.page.index import Index
from monologue.traces.page.pieces import Pieces
from monologue.traces.store import Episode, RunReader
from monologue.training.replay import replay
from monologue.training.starter.make import save
from monologue.training.starter.models import build_image_processor, build_speaker, build_tokenizer

PROBLEMS = list(Hops().problems("validation", 6))


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, with a habit."""
    folder, tokenizer = tmp_path_factory.mktemp("thinker"), build_tokenizer(VOCABULARY)
    save(build_speaker(2, tokenizer), tokenizer, folder, build_image_processor(112, 84))
    Habit(Mode(k=3), 2).save(folder)
    return folder


def seats(folder: Path, **sampling: Any) -> Mapping[str, Seat]:
    policy = load_policy(folder, "thinker", habit=Habit.load(folder), trainable=False, sampling=Sampling(max_tokens=3, **sampling))
    engine: Any = policy.backend
    others = oracle(codec_for(engine.tokenizer, engine), engine)
    return {"thinker": policy, "questioner": others, "answerer": others}


@pytest.fixture(scope="module")
def trusted(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trusted") / "run"
    play("latent:percent=0", PROBLEMS, seats(thinker), run, progress=False)
    return run


def episodes(run: Path) -> list[Episode]:
    return list(RunReader(run).episodes())


def thoughts(episode: Episode) -> list[dict[str, Any]]:
    (span,) = [span for span in episode.spans if span.attributes[names.ROLE] == "thinker"]
    return [dict(event.attributes) for event in span.events if event.name == names.LATENT_STEP]


def test_every_latent_step_is_an_event_with_patches_norm_and_nearest_words(trusted: Path) -> None:
    for episode in episodes(trusted):
        steps = thoughts(episode)
        assert [step["step"] for step in steps] == [0, 1]
        chosen = [json.loads(step["chosen"]) for step in steps]
        assert all(len(set(patches)) == 3 and set(patches) <= set(range(12)) for patches in chosen)
        assert not set(chosen[0]) & set(chosen[1])
        words, chances = json.loads(steps[0]["words"]), json.loads(steps[0]["chances"])
        assert len(words) == len(chances) == 3 and chances == sorted(chances, reverse=True) and steps[0]["norm"] > 0


def test_the_log_probs_after_thoughts_are_replayed(thinker: Path, trusted: Path) -> None:
    checks = {check.name: check for check in replay(trusted)}
    assert all(check.ok for check in checks.values()), checks
    assert checks["replay thinker"].figure < 1e-5 and "image swap" in checks
    assert {episode.calls()[0].engine for episode in episodes(trusted)} == {LATENT}


def test_thoughts_forced_by_the_trace_are_those_that_were_thought(trusted: Path) -> None:
    for episode in episodes(trusted):
        call = episode.calls()[0]
        assert list(map(list, call.chosen)) == [json.loads(step["chosen"]) for step in thoughts(episode)]
        assert not call.trainable


def test_where_it_is_unsure_the_monologue_is_held_out_loud(thinker: Path, tmp_path: Path) -> None:
    summary = play("latent:percent=101", PROBLEMS, seats(thinker), tmp_path / "run", progress=False, score=Hops().score)
    assert summary.score().accuracy == 1.0
    for episode in episodes(tmp_path / "run"):
        roles = [str(span.attributes[names.ROLE]) for span in episode.spans]
        hops = len(roles) // 2 - 1
        assert roles == ["thinker", *["questioner", "answerer"] * hops, "questioner"]
        assert episode.spans[0].attributes[names.EDGE] == "unsure"


def test_a_sure_thinker_ends_at_once_and_an_unsure_one_does_not(thinker: Path, tmp_path: Path) -> None:
    """Each episode's edge follows from the probability of what was said."""
    play("latent:percent=30", PROBLEMS, seats(thinker), tmp_path / "run", progress=False)
    for episode in episodes(tmp_path / "run"):
        call = episode.calls()[0]
        assert call.sampled_logprobs is not None
        sure = sum(call.sampled_logprobs) >= -1.2039728 and call.parse_error is None
        assert episode.spans[0].attributes[names.EDGE] == ("conclude" if sure else "unsure")


def test_a_batch_thinks_as_each_would_alone(thinker: Path, trusted: Path, tmp_path: Path) -> None:
    play("latent:percent=0", PROBLEMS, seats(thinker), tmp_path / "run", progress=False, concurrency=1)
    together, alone = ({one.start.problem_id: one for one in episodes(run)} for run in (trusted, tmp_path / "run"))
    for key, episode in together.items():
        first, second = episode.calls()[0], alone[key].calls()[0]
        assert first.sampled_ids == second.sampled_ids and first.chosen == second.chosen
        assert first.sampled_logprobs == pytest.approx(second.sampled_logprobs, abs=1e-4)


def test_a_learned_stop_thinks_until_the_state_has_finished(thinker: Path) -> None:
    import torch

    from monologue.backends.checkpoints import open_checkpoint
    from monologue.backends.perception.ivtlr import LatentReasoner

    model = open_checkpoint(str(thinker), device="cpu", dtype=torch.float32).model
    reasoner = LatentReasoner(model, OURS)
    state = model.get_input_embeddings().weight[[9, 9]] * torch.tensor([[50.0], [-50.0]])
    halt = Habit(OURS, 3, think=9).halt(reasoner)
    assert halt is not None and halt(0, state).tolist() == [False, True]
    assert Habit(OURS, 3).halt(reasoner) is None


def test_the_shape_of_a_run_keeps_no_words_of_a_thought(thinker: Path, tmp_path: Path) -> None:
    play("latent:percent=0", PROBLEMS[:1], seats(thinker), tmp_path / "run", progress=False, capture="shape")
    (episode,) = episodes(tmp_path / "run")
    assert all("words" not in step and step["norm"] > 0 for step in thoughts(episode))


def test_the_page_shows_each_latent_step(trusted: Path) -> None:
    index = Index(trusted)
    index.refresh()
    row = index.row(episodes(trusted)[0].start.episode_id)
    assert row is not None
    found = detail(row, Pieces(trusted))["spans"][0]["latents"]
    assert [latent["step"] for latent in found] == [0, 1] and all(len(latent["chosen"]) == 3 for latent in found)


def test_a_checkpoint_that_was_never_taught_does_not_take_the_seat(thinker: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="monologue train latent"):
        Habit.load(tmp_path)
    (tmp_path / "latent.json").write_text('{"mode": {"k": 0}, "steps": 1}')
    with pytest.raises(BackendError, match="does not say how to think"):
        Habit.load(tmp_path)
    with pytest.raises(BackendError, match="random patches"):
        load_policy(thinker, "thinker", habit=Habit(Mode(patches="random"), 1))


@pytest.mark.parametrize("habit", ['{"mode": {"k": 2}, "steps": "3"}', '{"mode": {"k": 2}, "steps": 3, "think": -1}'])
def test_a_habit_of_other_types_is_refused(tmp_path: Path, habit: str) -> None:
    (tmp_path / "latent.json").write_text(habit)
    with pytest.raises(BackendError, match="a whole number from 0"):
        Habit.load(tmp_path)


def test_a_think_word_outside_of_the_vocabulary_is_refused_when_the_thinker_is_opened(
    thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Played or examined; nothing is written."""
    strange = shutil.copytree(thinker, tmp_path / "strange")
    Habit(Mode(k=3), 2, think=999).save(strange)
    for words in (["eval", "latent", "--json", "found.json"], ["play", "--graph", "latent", "--out", "run"]):
        place = str(tmp_path / words[-1])
        assert main([*words[:-1], place, "--task", "hops", "--thinker", str(strange), "--n", "2"]) == 2
        assert re.search(r"expected a 'think' in latent.json from 0 to \d+, .*got 999", capsys.readouterr().err)
        assert not Path(place).exists()


def test_a_thinker_is_not_seated_where_it_would_answer_without_thoughts(
    thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither played, evaluated, reinforced nor served; a checkpoint that was taught no step yet is an ordinary policy."""
    learned, graph = ["--set", f'answerer="{thinker}"', "--set", 'graph="direct"', "--set", 'trained=["answerer"]'], ["--graph", "direct"]
    for words in (
        ["play", *graph, "--task", "hops", "--n", "2", "--out", str(tmp_path / "run"), "--answerer", str(thinker)],
        ["eval", *graph, "--task", "hops", "--n", "2", "--answerer", str(thinker)],
        ["train", "reinforce", "reinforce", "--set", 'task="hops"', "--out", str(tmp_path / "run"), *learned],
        ["serve", "--device", "cpu", "--questioner", "none", "--answerer", str(thinker)],
    ):
        assert main(words) == 2, words
        told = capsys.readouterr().err
        assert f"the seat 'answerer' takes none; seat it by play --graph latent:percent=0 --thinker {thinker} or serve --thinker" in told
    assert not (tmp_path / "run").exists()
    quiet = shutil.copytree(thinker, tmp_path / "quiet")
    Habit(Mode(k=3), 0).save(quiet)
    assert main(["play", *graph, "--task", "hops", "--n", "2", "--out", str(tmp_path / "run"), "--answerer", str(quiet)]) == 0


GREEDY = Sampling(temperature=0.0, max_tokens=2)


async def test_given_patches_are_taken_beside_requests_that_choose(thinker: Path, trusted: Path) -> None:
    engine = HFBackend(thinker, habit=Habit.load(thinker), window=0.1)
    (call,) = [call for call in episodes(trusted)[0].calls() if call.role == "thinker"]
    pictures = tuple(Picture(image.sha256, RunReader(trusted).picture(image.sha256)) for image in call.images)
    free = Prompt(call.prompt_ids, pictures)
    prompts = [dataclasses.replace(free, chosen=((0, 1, 2), (3, 4, 5))), free, dataclasses.replace(free, chosen=((6, 7, 8), (9, 10, 11)))]
    alone = [await engine.score(prompt, call.sampled_ids, GREEDY) for prompt in prompts]
    assert len(set(alone)) == 3
    together = await asyncio.gather(*[engine.score(prompt, call.sampled_ids, GREEDY) for prompt in prompts])
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    said = await asyncio.gather(*[engine.generate(prompt, GREEDY) for prompt in prompts])
    assert [tuple(thought.chosen for thought in one.thoughts) for one in said[::2]] == [prompt.chosen for prompt in prompts[::2]]
    await engine.aclose()


def test_a_threshold_outside_of_its_range_is_refused() -> None:
    with pytest.raises(GraphError, match="102"):
        latent.build(102)
    assert find("latent:percent=80").roles == ("thinker", "questioner", "answerer")


def test_the_command_examines_any_thinker(thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "latent", "--controls", "--task", "hops", "--thinker", str(thinker), "--n", "8", "--split", "validation"]
    assert main([*words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["controls"][0]["control"] == "none" and len(found["recall"]) == 2
    told = capsys.readouterr().out
    assert "shuffled" in told and found["probes"] == []
    assert "no probes: expected 20 or more problems that say what a step finds, each with that step taken, got 8" in told
    assert main(["eval", "latent", "--controls", "--thinker", str(thinker), "--graph", "direct"]) == 2
    assert main(["eval", "latent", "--temperature", "1", "--thinker", str(thinker)]) == 2
    assert main(["eval", "latent", "--concurrency", "3", "--thinker", str(thinker)]) == 2
    assert main(["eval", "--controls"]) == 2


def test_probes_that_not_all_states_and_findings_have_are_shown_with_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    """A step may be taken by 20 problems of which fewer say what it finds."""
    show_states([{"state": 1, "finding": 1, "accuracy": 0.5}, {"state": 2, "finding": 2, "accuracy": 0.25}], [], [])
    assert [line.split() for line in capsys.readouterr().out.splitlines()][3:5] == [
        ["state", "1", "0.500", "-"],
        ["state", "2", "-", "0.250"],
    ]


@pytest.mark.parametrize("named", ["oracle", "http://127.0.0.1:30000", "https://host", "chat:openai:gpt-5-mini"])
def test_what_shows_no_states_is_not_examined_as_a_thinker(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "latent", "--task", "hops", "--thinker", named]) == 2
    told = capsys.readouterr().err
    assert "--thinker is 'starter' or a folder that 'monologue train latent' wrote" in told and repr(named) in told


def test_policies_that_do_not_think_have_no_thoughts(thinker: Path) -> None:
    policy = load_policy(thinker, "answerer")
    assert isinstance(policy, Policy) and policy.backend.facts.engine == "transformers"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("shipped") / "run"
    assert main(["play", "--task", "hops", "--graph", "latent:percent=0", "--split", "validation", "--n", "24", "--out", str(run)]) == 0
    return run


def test_the_shipped_thinker_takes_a_step_for_each_look_up_and_is_right(shipped: Path) -> None:
    problems = {problem.id: problem for problem in Hops().problems("validation", 24)}
    played = {one.start.problem_id: one for one in episodes(shipped)}
    assert sum(len(thoughts(played[name])) == problem.hops for name, problem in problems.items()) >= 22
    answers = {name: end.answer for name, one in played.items() if (end := one.end) is not None}
    assert sum(answers[name] == problem.choices[problem.gold or 0] for name, problem in problems.items()) >= 22


def test_thoughts_of_different_length_are_replayed_together(shipped: Path) -> None:
    assert len({len(thoughts(one)) for one in episodes(shipped)}) > 2
    checks = {check.name: check for check in replay(shipped)}
    assert all(check.ok for check in checks.values()) and checks["replay thinker"].figure < 1e-4


def test_a_thinker_without_patches_is_replayed_too(thinker: Path, tmp_path: Path) -> None:
    policy = load_policy(thinker, "thinker", habit=Habit(Mode(patches="none"), 2), trainable=False, sampling=Sampling(max_tokens=3))
    play("latent:percent=0", PROBLEMS, {**seats(thinker), "thinker": policy}, tmp_path / "run", progress=False)
    assert all(len(thoughts(one)) == 2 and thoughts(one)[0]["chosen"] == "[]" for one in episodes(tmp_path / "run"))
    assert all(check.ok for check in replay(tmp_path / "run"))
    (habit,) = {call.habit for one in episodes(tmp_path / "run") for call in one.calls() if call.engine == LATENT}
    assert habit is not None and Habit.heard(habit) == Habit(Mode(patches="none"), 2), "replayed as it thought, not as the folder says"
