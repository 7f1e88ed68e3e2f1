"""Real checkpoints in the seats: random weights, real tokenizers, the whole path from folder to trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from monologue.agents.codec import CodecError, TinyCodec
from monologue.agents.load import load_policy
from monologue.backends.base import Sampling
from monologue.graphs.play import play
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader
from monologue.training.starter.models import build_answerer, build_image_processor, build_questioner, build_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for role, build in (("questioner", build_questioner), ("answerer", build_answerer)):
        folder = found[role] = tmp_path_factory.mktemp(role)
        tokenizer = build_tokenizer()
        build(0, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(found["answerer"])
    return found


@pytest.mark.parametrize(("graph", "role", "pads"), [("blind", "questioner", 0), ("direct", "answerer", 9)])
def test_untrained_policies_play_to_the_end_and_leave_exact_traces(
    folders: dict[str, Path], tmp_path: Path, graph: str, role: str, pads: int
) -> None:
    policy = load_policy(folders[role], role, sampling=Sampling(max_tokens=12))
    summary = play(graph, Shapes().problems("train", 4), {role: policy}, tmp_path / "run", max_turns=2)
    assert summary.ok == 4, summary.failed
    calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
    assert len(calls) >= 4 and {call.role for call in calls} == {role}
    for call in calls:
        assert call.sampled_logprobs is not None and len(call.sampled_logprobs) == len(call.sampled_ids)
        assert sum(image.placeholder_count for image in call.images) == pads
        assert call.tokenizer_hash == policy.backend.facts.tokenizer_hash


def test_a_text_only_model_cannot_answer_about_pictures(folders: dict[str, Path]) -> None:
    with pytest.raises(CodecError, match="text-only"):
        load_policy(folders["questioner"], "answerer")


def test_a_starter_tokenizer_gets_the_tiny_codec(folders: dict[str, Path]) -> None:
    assert isinstance(load_policy(folders["questioner"], "questioner").codec, TinyCodec)
