"""The proof itself, and that it fails, by name and span, on every kind of damage: each is planted exactly, in a run of real policies."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, StateGraph
from PIL import Image

from monologue.agents import answerer
from monologue.agents.codec import TinyCodec
from monologue.agents.load import load_policy
from monologue.agents.messages import Message, Reply
from monologue.agents.policy import Policy
from monologue.backends.base import Picture, Prompt, Sampling
from monologue.backends.hf import HFBackend
from monologue.cli import main
from monologue.graphs.nodes import Step, policy_node
from monologue.graphs.play import play
from monologue.graphs.registry import Graph
from monologue.graphs.state import Context, State
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces import names
from monologue.traces.codes import pack_floats, pack_ids, unpack_floats, unpack_ids
from monologue.traces.schema import PolicyCall
from monologue.traces.store import RunReader
from monologue.traces.verify import Check, verify
from monologue.training.replay import Weights, areplay, drawn, replay

HOT = Sampling(temperature=1.5, top_p=0.95)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the starter policies, hot enough to say strange things."""
    run = tmp_path_factory.mktemp("replay") / "run"
    seats = {role: load_policy(starter(role), role, sampling=HOT, policy_id=role) for role in ("questioner", "answerer")}
    play("monologue", Shapes().problems("validation", 12), seats, run, progress=False)
    return run


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def table(run: Path, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in (*verify(run), *replay(run, **options))}


def broken(run: Path, **options: Any) -> dict[str, Check]:
    return {name: check for name, check in table(run, **options).items() if not check.ok}


def edit(run: Path, change: Callable[[list[dict[str, Any]]], str]) -> str:
    """Applies a change to the records of the only writer; returns what the change returns: the span that it touched."""
    (file,) = (run / "spans").glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    touched = change(records)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return touched


def policy_spans(records: list[dict[str, Any]], role: str = "questioner", least: int = 4) -> Iterator[dict[str, Any]]:
    for record in records:
        facts = record.get("attributes", {})
        if facts.get(names.ROLE) == role and len(unpack_ids(facts[names.SAMPLED_IDS])) >= least:
            yield record


def test_an_honest_run_holds_every_check(run: Path) -> None:
    found = table(run)
    assert all(check.ok for check in found.values()), found
    assert found["replay questioner"].figure < 1e-4 and found["replay answerer"].figure < 1e-4
    assert "flat" not in (found["off by one"].detail or "") and found["image swap"].figure > 0.01


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.7, top_k=3), Sampling(temperature=2.0, top_p=0.5)])
def test_greedy_and_truncated_sampling_replay_too(tmp_path: Path, sampling: Sampling) -> None:
    seats = {role: load_policy(starter(role), role, sampling=sampling) for role in ("questioner", "answerer")}
    play("monologue", Shapes().problems("validation", 6), seats, tmp_path / "run", progress=False)
    assert not broken(tmp_path / "run")


def test_a_dropped_picture_is_named(run: Path) -> None:
    next((run / "images").iterdir()).unlink()
    found = broken(run)
    assert {"pictures", "facts"} <= set(found) and found["facts"].span and "lacks the picture" in (found["facts"].detail or "")


def test_a_painted_over_picture_breaks_hash_and_replay(run: Path) -> None:
    for file in (run / "images").iterdir():
        Image.new("RGB", (84, 84), "white").save(file)
    assert {"pictures", "replay answerer"} <= set(broken(run))


def test_log_probs_shifted_by_one_are_told_from_wrong_ones(run: Path) -> None:
    def shift(records: list[dict[str, Any]]) -> str:
        for span in policy_spans(records):
            values = unpack_floats(span["attributes"][names.SAMPLED_LOGPROBS])
            span["attributes"][names.SAMPLED_LOGPROBS] = pack_floats((0.0, *values[:-1]))
        return ""

    edit(run, shift)
    found = broken(run)
    assert {"replay questioner", "off by one"} <= set(found) and found["off by one"].span


def test_text_that_was_edited_and_tokenised_again_is_named(run: Path) -> None:
    engine = HFBackend(starter("questioner"))

    def reword(records: list[dict[str, Any]]) -> str:
        for span in policy_spans(records):
            ids = unpack_ids(span["attributes"][names.SAMPLED_IDS])
            text = engine.tokenizer.decode(list(ids), skip_special_tokens=False)
            if "colour" in text:
                again = engine.tokenizer.encode(text.replace("colour", "shape"), add_special_tokens=False)
                assert len(again) == len(ids) and tuple(again) != ids
                span["attributes"][names.SAMPLED_IDS] = pack_ids(again)
                return str(span["span_id"])
        raise AssertionError("no question about a colour was asked")

    touched = edit(run, reword)
    found = broken(run)
    assert found["replay questioner"].span == touched


def test_edited_prompts_are_named(run: Path) -> None:
    def turn_words_round(records: list[dict[str, Any]]) -> str:
        for span in policy_spans(records):
            ids = unpack_ids(span["attributes"][names.PROMPT_DELTA])
            span["attributes"][names.PROMPT_DELTA] = pack_ids((*ids[:2], *reversed(ids[2:-1]), ids[-1]))
        return ""

    edit(run, turn_words_round)
    assert broken(run)["replay questioner"].span


def test_swapped_weights_are_found_by_their_numbers(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(starter("questioner"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    weights[name] = weights[name] * 1.05
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    found = broken(run, engines=Weights(run, {"questioner": str(other)}))
    assert set(found) == {"facts", "replay questioner"} and "now holds" in (found["facts"].detail or "")


def test_another_tokenizer_or_processor_is_found_before_any_number(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(starter("answerer"), tmp_path / "other"))
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.1, 0.1, 0.1]
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    found = broken(run, engines=Weights(run, {"answerer": str(other)}))
    assert "image processor" in (found["facts"].detail or "") and "replay answerer" in found


def test_a_lost_span_is_counted_and_what_it_carried_is_missed(run: Path) -> None:
    def lose(records: list[dict[str, Any]]) -> str:
        span = next(policy_spans(records))
        records.remove(span)
        return str(span["episode_id"])

    episode = edit(run, lose)
    found = broken(run)
    assert "spans" in found and {"prefix", "facts"} & set(found)
    assert episode in {check.span for check in found.values()} or found["spans"].span


def test_a_torn_last_line_is_a_breach_and_the_rest_still_replays(run: Path) -> None:
    (file,) = (run / "spans").glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-30])
    found = table(run)
    assert not found["records"].ok and not found["episodes"].ok and found["replay questioner"].ok


def test_unknown_weights_say_how_to_name_them(run: Path) -> None:
    def later(records: list[dict[str, Any]]) -> str:
        span = next(policy_spans(records))
        span["attributes"][names.WEIGHTS] = "step-5"
        return str(span["span_id"])

    touched = edit(run, later)
    found = broken(run)
    assert found["facts"].span == touched and "--weights questioner@step-5=FOLDER" in (found["facts"].detail or "")


def test_weights_are_taken_from_the_runs_own_checkpoints(run: Path) -> None:
    def later(records: list[dict[str, Any]]) -> str:
        for span in policy_spans(records, least=1):
            span["attributes"][names.WEIGHTS] = "step-5"
        return ""

    edit(run, later)
    shutil.copytree(starter("questioner"), run / "checkpoints" / "questioner" / "step-5")
    assert not broken(run)


def test_a_number_that_is_none_agrees_with_nothing(run: Path) -> None:
    def spoil(records: list[dict[str, Any]]) -> str:
        span = next(policy_spans(records))
        values = list(unpack_floats(span["attributes"][names.SAMPLED_LOGPROBS]))
        values[1] = float("nan")
        span["attributes"][names.SAMPLED_LOGPROBS] = pack_floats(values)
        return str(span["span_id"])

    touched = edit(run, spoil)
    assert broken(run)["replay questioner"].span == touched


def test_the_command_prints_the_table_and_exits_by_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checks.json"
    assert main(["verify", str(run), "--json", str(file)]) == 0
    assert "replay answerer" in capsys.readouterr().out
    next((run / "images").iterdir()).unlink()
    assert main(["verify", str(run), "--json", str(file)]) == 1
    checks = {check["name"]: check for check in json.loads(file.read_text())["checks"]}
    assert not checks["facts"]["ok"] and checks["facts"]["span"] in capsys.readouterr().out
    assert main(["verify", str(run), "--weights", "nonsense"]) == 2


def glance(state: State, context: Context) -> list[Message]:
    """The picture at first; afterwards two pictures more, one of them cut out of it."""
    whole = context.pictures[0]
    if not context.opened("answerer"):
        return answerer.opening(context.wording("answerer"), "what colour is at a1 ?", [whole])
    crops = [context.record.store(whole.image.crop(box)) for box in ((0, 0, 56, 84), (20, 30, 84, 84))]
    return answerer.asked("what colour is at b2 ?", crops)


def again(state: State, action: Any, context: Context) -> Step:
    asked = state.get("asked", 0) + 1
    goto = END if asked == 3 else "glance"
    return Step({"asked": asked, **({"answer": "red"} if asked == 3 else {})}, goto, "on")


def test_crops_and_many_pictures_in_one_stream_replay(tmp_path: Path) -> None:
    engine = HFBackend(starter("answerer"))
    room = engine.placeholders
    policy = Policy(
        engine, TinyCodec(engine.tokenizer, lambda picture: room(picture.image).count), Sampling(temperature=3.0, max_tokens=6), "eyes"
    )
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("glance", policy_node("glance", "answerer", glance, again, (Reply,)), destinations=("glance", END))
    graph.add_edge(START, "glance")
    own = Graph("glances", ("answerer",), lambda: graph.compile())
    assert len(play(own, Shapes().problems("validation", 6), {"answerer": policy}, tmp_path / "run", progress=False).failed) == 0
    calls = [call for episode in RunReader(tmp_path / "run").episodes() for call in episode.calls()]
    assert max(len(call.images) for call in calls) == 5 and len({(i.width, i.height) for call in calls for i in call.images}) == 3
    assert not broken(tmp_path / "run")


def test_a_call_in_whose_middle_the_weights_changed_is_replayed_by_each_version(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(starter("questioner"), tmp_path / "other"))
    moved = {name: value * 1.02 for name, value in load_file(other / "model.safetensors").items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    calls = {call.span_id: call for episode in RunReader(run).episodes() for call in episode.calls()}

    async def rescored(call: PolicyCall) -> tuple[float, ...]:
        engine = HFBackend(other)
        found = await engine.score(Prompt(call.prompt_ids), call.sampled_ids, HOT)
        await engine.aclose()
        return found

    def swap(records: list[dict[str, Any]]) -> str:
        span = next(policy_spans(records))
        call = calls[span["span_id"]]
        late = asyncio.run(rescored(call))
        span["attributes"][names.SAMPLED_LOGPROBS] = pack_floats((*(call.sampled_logprobs or ())[:2], *late[2:]))
        parts = [(call.weights_version, 0, 2), ("step-1", 2, len(late))]
        span["attributes"][names.WEIGHTS_BY_TOKEN], span["attributes"][names.WEIGHTS] = json.dumps(parts), "step-1"
        return str(span["span_id"])

    place = edit(run, swap)
    read = {call.span_id: call for episode in RunReader(run).episodes() for call in episode.calls()}
    assert [version for version, _, _ in read[place].weights] == [calls[place].weights_version, "step-1"]
    given = {"questioner@step-1": str(other)}
    assert broken(run, engines=Weights(run, given)) == {}
    assert broken(run)["facts"].span == place

    def misshare(records: list[dict[str, Any]]) -> str:
        span = next(policy_spans(records))
        span["attributes"][names.WEIGHTS_BY_TOKEN] = json.dumps([["base", 0, 1], ["step-1", 2, 99]])
        return str(span["span_id"])

    edit(run, misshare)
    assert "share out" in str(broken(run, engines=Weights(run, given))["facts"].detail)


def test_swapping_the_picture_moves_nothing_where_pixels_are_ignored(run: Path) -> None:
    """The image-swap test can fail: an engine that looks at one fixed picture, whatever it is shown."""
    blank = Picture("0" * 64, Image.new("RGB", (84, 84)))
    inner = Weights(run)

    class Blind:
        def __init__(self, engine: Any) -> None:
            self.engine, self.facts = engine, engine.facts
            self.placeholders, self.processor_hash = engine.placeholders, engine.processor_hash

        async def score(self, prompt: Any, ids: tuple[int, ...], sampling: Sampling) -> tuple[float, ...]:
            from dataclasses import replace

            return tuple(await self.engine.score(replace(prompt, pictures=(blank,) * len(prompt.pictures)), ids, sampling))

    found = {check.name: check for check in asyncio.run(areplay(run, lambda call: Blind(inner(call))))}  # type: ignore[arg-type,return-value]
    assert not found["image swap"].ok and found["image swap"].span and not found["replay answerer"].ok
    assert found["replay questioner"].ok


def test_a_proof_by_some_calls_draws_them_from_the_whole_run() -> None:
    calls: list[Any] = list(range(1000))
    some: list[Any] = list(drawn(calls, 64))
    assert len(set(some)) == 64 and max(some) > 800 and some == list(drawn(calls, 64))
    assert list(drawn(calls[:5], 64)) == calls[:5] and list(drawn(calls, None)) == calls
