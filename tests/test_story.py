"""The main job, whole: shipped policies hold a monologue over drawn pictures, and the trace is all a trainer needs."""

import asyncio
from pathlib import Path

import pytest

from monologue.agents.load import codec_for, load_policy
from monologue.agents.policy import Policy
from monologue.backends.base import Prompt, Sampling
from monologue.graphs.oracle import oracle
from monologue.graphs.play import play
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.images import Picture
from monologue.traces.schema import PolicyCall
from monologue.traces.store import RunReader
from monologue.traces.verify import verify

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def seats() -> dict[str, Policy]:
    return {role: load_policy(starter(role), role, sampling=GREEDY) for role in ("questioner", "answerer")}


def test_the_shipped_policies_solve_more_than_a_guesser_and_their_trace_verifies(seats: dict[str, Policy], tmp_path: Path) -> None:
    summary = play("monologue", Shapes().problems("validation", 40), seats, tmp_path / "run", progress=False)
    assert not summary.failed and summary.ok == 40
    score = summary.score()
    assert score.accuracy > score.chance + 3 * 0.08  # three standard errors of a guesser on 40 problems
    assert all(check.ok for check in verify(tmp_path / "run"))


def test_a_stored_call_holds_what_its_log_probs_are_computed_from(seats: dict[str, Policy], tmp_path: Path) -> None:
    sampled = {role: Policy(p.backend, p.codec, Sampling(temperature=1.0, top_p=0.95), p.policy_id) for role, p in seats.items()}
    play("monologue", Shapes().problems("validation", 10), sampled, tmp_path / "run", progress=False, seed=3)
    reader = RunReader(tmp_path / "run")
    calls = [call for episode in reader.episodes() for call in episode.calls()]
    assert {call.role for call in calls} == {"questioner", "answerer"}
    for call in calls[:24]:
        again = asyncio.run(_score(seats[call.role], reader, call))
        assert again == pytest.approx(call.sampled_logprobs, abs=1e-4)


async def _score(policy: Policy, reader: RunReader, call: PolicyCall) -> tuple[float, ...]:
    pictures = tuple(Picture(image.sha256, reader.picture(image.sha256)) for image in call.images)
    settings = Sampling(call.sampling["temperature"], call.sampling["top_p"], call.sampling["top_k"])
    return await policy.backend.score(Prompt(call.prompt_ids, pictures), call.sampled_ids, settings)


def test_an_oracle_writes_the_same_kind_of_trace_with_every_answer_right(seats: dict[str, Policy], tmp_path: Path) -> None:
    teachers = {role: oracle(codec_for(p.backend.tokenizer, p.backend if role == "answerer" else None),  # type: ignore[attr-defined, arg-type]
                             p.backend if role == "answerer" else None) for role, p in seats.items()}  # type: ignore[arg-type]  # fmt: skip
    summary = play("monologue", Shapes().problems("train", 20), teachers, tmp_path / "run", progress=False)
    assert summary.score().accuracy == 1.0
    assert all(check.ok for check in verify(tmp_path / "run"))


def test_a_monologue_without_its_evidence_falls(seats: dict[str, Policy], tmp_path: Path) -> None:
    problems = list(Shapes().problems("validation", 60))
    sound = play("monologue", problems, seats, tmp_path / "sound", progress=False).score()
    wrong = play("monologue", problems, seats, tmp_path / "wrong", progress=False, control="wrong-picture").score()
    assert wrong.accuracy < sound.accuracy - 0.2
