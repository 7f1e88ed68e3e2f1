"""Ids come through log, disk and row bit for bit; rows merge on exact prefixes only; cutting a row changes no loss and no gradient."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monologue.agents.load import load_policy
from monologue.backends.base import Prompt, Sampling
from monologue.backends.checkpoints import open_checkpoint
from monologue.backends.hf import HFBackend
from monologue.backends.inputs import Inputs
from monologue.graphs.play import play
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.images import Picture
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunReader, RunWriter
from monologue.training.collate import Batch, Collate, sampled_logprobs
from monologue.training.losses import imitation
from monologue.training.rows import Counts, Row, RowError, plain_row, read_rows, split

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=12).map(tuple)
SAID = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8).map(tuple)
LOGPROBS = st.floats(-1e4, 0, width=32)
FACTS: dict[str, Any] = {
    **{"policy_id": "p", "weights_version": "0", "trainable": True, "engine": "e", "engine_version": "1", "model": "m"},
    **{"tokenizer_hash": "t", "template_hash": "c", "finish_reason": "stop", "truncated": False, "images": (), "messages": ()},
    **{"output": "", "action": None, "parse_error": None, "cached_tokens": None},
}


def call(prompt: tuple[int, ...], said: tuple[int, ...], logprobs: tuple[float, ...] | None, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "max_tokens": 8}
    mask = bytes(index % 2 for index in range(len(said)))
    return {
        **FACTS,
        "prompt_ids": prompt,
        "sampled_ids": said,
        "sampled_logprobs": logprobs,
        "loss_mask": mask,
        "sampling": sampling,
        **more,
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(IDS, SAID, st.data(), st.sampled_from(["a", "b"]), st.booleans()), min_size=1, max_size=8))
def test_ids_log_probs_and_masks_are_bit_equal_from_log_to_row(turns: list[Any]) -> None:
    """Any ids at all, non-canonical merges included: nothing here knows a tokenizer. Some prompts break the prefix."""
    expected: dict[str, list[tuple[tuple[int, ...], list[Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder) / "run")
        with Recorder(writer).episode(problem_id="p", task="t", graph="g", group_id="p", question="q") as episode:
            for new, said, data, role, breaks in turns:
                rows = expected.setdefault(role, [])
                before = rows[-1][0] if rows else ()
                prompt = new if breaks else before + new
                logprobs = tuple(data.draw(st.lists(LOGPROBS, min_size=len(said), max_size=len(said))))
                piece = [(len(prompt), said, logprobs)]
                grows = rows and prompt[: len(before)] == before
                rows[-1:] = [(prompt + said, rows[-1][1] + piece)] if grows else [*rows[-1:], (prompt + said, piece)]
                with episode.policy(role=role, node="n") as span:
                    span.record(**call(prompt, said, logprobs))
            episode.finish("x")
        writer.close()
        counts = Counts()
        found = list(read_rows(Path(folder) / "run", counts=counts))
    for role, rows in expected.items():
        mine = [row for row in found if row.role == role]
        assert [row.ids for row in mine] == [ids for ids, _ in rows]
        assert [[(p.start, row.ids[p.start : p.stop], p.logprobs) for p in row.pieces] for row in mine] == [pieces for _, pieces in rows]
        assert all(p.loss_mask == bytes(i % 2 for i in range(p.stop - p.start)) for row in mine for p in row.pieces)
    assert counts.calls == len(turns) and counts.breaks.total() == len(found) - len(expected)
    assert counts.sampled == sum(sum(p.stop - p.start for p in row.pieces) for row in found)


@pytest.mark.parametrize("turns", [2, 8, 32])
def test_merged_rows_are_linear_in_turns_and_one_row_a_call_is_not(tmp_path: Path, turns: int) -> None:
    writer = RunWriter(tmp_path / "run")
    with Recorder(writer).episode(problem_id="p", task="t", graph="g", group_id="p", question="q") as episode:
        ids: tuple[int, ...] = ()
        for turn in range(turns):
            with episode.policy(role="a", node="n") as span:
                span.record(**call((*ids, 1, 2, 3), (turn,), (0.0,)))
            ids = (*ids, 1, 2, 3, turn)
        episode.finish(None)
    writer.close()
    merged, single = Counts(), Counts()
    assert len(list(read_rows(tmp_path / "run", counts=merged))) == 1
    assert len(list(read_rows(tmp_path / "run", counts=single, merge=False))) == turns
    assert merged.tokens == 4 * turns and single.tokens == merged.per_call == 2 * turns * (turns + 1)


def test_what_must_not_be_trained_on_is_left_out_and_counted(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    recorder = Recorder(writer)
    facts = {"problem_id": "p", "task": "t", "graph": "g", "group_id": "p", "question": "q"}
    with pytest.raises(RuntimeError), recorder.episode(**facts) as episode:
        raise RuntimeError("broken")
    with recorder.episode(**facts) as episode:
        for role, trainable in (("a", True), ("judge", False)):
            with episode.policy(role=role, node="n") as span:
                span.record(**call((1,), (2,), (-1.0,), trainable=trainable))
        episode.annotate(name="exact_match", value=0.0, source="t")
        episode.annotate(name="own", value=0.5, scope="role", role="judge", source="t")
        episode.finish(None)
    writer.close()
    counts = Counts()
    (row,) = read_rows(tmp_path / "run", counts=counts)
    assert row.role == "a" and row.reward("exact_match") == 0.0 and row.reward("own") is None
    assert counts.skipped == {"failed episode": 1, "call of a policy that is not trainable": 1}
    assert list(read_rows(tmp_path / "run", roles=["judge"])) == []


def test_a_piece_without_log_probs_is_told_from_one_with_zeros(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    for logprobs in (None, (0.0, 0.0)):
        with Recorder(writer).episode(problem_id="p", task="t", graph="g", group_id="p", question="q") as episode:
            with episode.policy(role="a", node="n") as span:
                span.record(**call((1,), (2, 3), logprobs))
            episode.finish(None)
    writer.close()
    first, second = read_rows(tmp_path / "run")
    assert first.logprobs is None and second.logprobs == (0.0, 0.0, 0.0)
    assert plain_row(first)["logprobs"] is None and plain_row(second)["mask"] == [0, 0, 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of the starter policies, hot and truncated, of different lengths."""
    folder = tmp_path_factory.mktemp("rows") / "run"
    hot = Sampling(temperature=1.5, top_p=0.97)
    seats = {role: load_policy(starter(role), role, sampling=hot) for role in ("questioner", "answerer")}
    play("monologue", Shapes().problems("validation", 10), seats, folder, progress=False)
    return folder


def opened(role: str, run: Path) -> tuple[Any, Inputs, Collate, list[Row]]:
    checkpoint = open_checkpoint(str(starter(role)), device="cpu", dtype=torch.float64)
    inputs = Inputs(checkpoint)
    rows = [row for row in read_rows(run, roles=[role]) if len(row.pieces) > 1]
    return checkpoint.model.requires_grad_(True), inputs, Collate(inputs, RunReader(run).picture), rows


def gradient(model: Any, inputs: Inputs, batches: list[Batch], count: float, plain: bool) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    losses = [imitation(sampled_logprobs(model, batch, inputs.banned, plain=plain), batch.trained, count) for batch in batches]
    torch.stack(losses).sum().backward()
    slopes = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(torch.stack(losses).detach().sum()), slopes


@pytest.mark.parametrize("role", ["questioner", "answerer"])
@pytest.mark.parametrize("plain", [False, True])
def test_cutting_rows_and_batching_them_otherwise_changes_no_loss_and_no_gradient(run: Path, role: str, plain: bool) -> None:
    model, inputs, collate, rows = opened(role, run)
    assert len(rows) >= 5
    count = float(sum(sum(row.mask) for row in rows))
    whole, slope = gradient(model, inputs, [collate(rows)], count, plain)
    halves = [half for row in rows for half in split(row, 1)]
    for batches in ([collate([row]) for row in rows], [collate(halves)], [collate(halves[::-1])]):
        loss, other = gradient(model, inputs, batches, count, plain)
        assert math.isclose(loss, whole, rel_tol=1e-6)
        assert torch.linalg.vector_norm(other - slope) <= 1e-6 * torch.linalg.vector_norm(slope)
    assert torch.linalg.vector_norm(slope) > 0


@pytest.mark.parametrize("role", ["questioner", "answerer"])
def test_the_trainer_sees_what_the_sampler_saw(run: Path, role: str) -> None:
    model, inputs, collate, rows = opened(role, run)
    batch = collate(rows)
    with torch.no_grad():
        new = sampled_logprobs(model, batch, inputs.banned)
        plain = sampled_logprobs(model, batch, inputs.banned, plain=True)
    assert torch.max((new - batch.behaviour).abs()) < 1e-4
    assert torch.max((plain - batch.behaviour).abs()) > 1e-2


async def test_rows_and_the_engine_score_alike(run: Path) -> None:
    model, inputs, collate, rows = opened("answerer", run)
    reader, engine = RunReader(run), HFBackend(starter("answerer"))
    row = rows[0]
    with torch.no_grad():
        mine = sampled_logprobs(model, collate([row]), inputs.banned).tolist()
    pictures = tuple(Picture(image.sha256, reader.picture(image.sha256)) for image in row.images)
    theirs: list[float] = []
    for piece in row.pieces:
        sampling = Sampling(temperature=piece.temperature or 0.0, top_p=piece.top_p or 1.0)
        theirs += await engine.score(Prompt(row.ids[: piece.start], pictures), row.ids[piece.start : piece.stop], sampling)
    await engine.aclose()
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-4


def test_gradients_change_when_the_picture_changes(run: Path) -> None:
    model, inputs, collate, rows = opened("answerer", run)
    blind = Collate(inputs, lambda sha256: Image.new("RGB", (84, 84)))
    _, seen = gradient(model, inputs, [collate(rows)], 1.0, True)
    _, unseen = gradient(model, inputs, [blind(rows)], 1.0, True)
    assert torch.linalg.vector_norm(seen - unseen) > 0.1 * torch.linalg.vector_norm(seen)


def test_rows_that_do_not_fit_the_model_are_refused(run: Path) -> None:
    _, _, _, with_pictures = opened("answerer", run)
    _, _, collate, text = opened("questioner", run)
    from dataclasses import replace

    with pytest.raises(RowError, match="text-only"):
        collate(with_pictures[:1])
    with pytest.raises(RowError, match="ids from 0"):
        collate([replace(text[0], ids=(*text[0].ids, 10**6))])
    with pytest.raises(RowError, match="something sampled"):
        collate([replace(text[0], pieces=())])
    with pytest.raises(ValueError, match="a cut from 1"):
        split(text[0], len(text[0].pieces))
