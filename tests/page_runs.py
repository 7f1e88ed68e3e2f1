"""Runs for the tests of the page, written by hand: one episode with every feature, one of hostile text, and any number of plain ones."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from PIL import Image

from monologue.traces import names
from monologue.traces.codes import pack_floats
from monologue.traces.page.pieces import BYTES, hash_of
from monologue.traces.recorder import EpisodeRecorder, Recorder
from monologue.traces.schema import Annotation, EpisodeEnd, EpisodeStart, ImageRef, SpanRecord
from monologue.traces.store import RunWriter

BASE = len(BYTES["specials"])
LOGPROBS = (-0.1, -1.5, -3.25, -0.0009765625, -7.0, -0.5)
ADVANTAGES = (0.25, -0.75, 1.5, 0.0, -2.0, 0.125)
HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "<!--<script>",
    "javascript:window.pwned=3",
    "\u202egnp.exe\u202c \u2066isolated",
    "zero\u200bwidth\ufeff\u0000\u001b[31mred",
    "{{BOOT}} ${window.pwned=4} `",
    "Z" + "\u0334\u0335\u0336" * 200,
    "x" * 200_000,
)


def spelled(text: str) -> list[int]:
    return [BASE + byte for byte in text.encode()]


def facts(text: str, ids: list[int] | None = None, logprobs: Any = None, **more: Any) -> dict[str, Any]:
    """A call's facts; the ids are the text's bytes unless given."""
    ids = spelled(text) if ids is None else ids
    known: dict[str, Any] = {
        "prompt_ids": (1, 2, 3),
        "sampled_ids": ids,
        "sampled_logprobs": [-0.5] * len(ids) if logprobs is None else logprobs,
        "loss_mask": bytes([1]) * len(ids),
        "policy_id": "hand",
        "weights_version": "base",
        "trainable": True,
        "sampling": {"temperature": 1.0, "seed": 7, "max_tokens": 64},
        "engine": "hand",
        "engine_version": "1",
        "model": "nowhere/at-all",
        "tokenizer_hash": hash_of(BYTES),
        "template_hash": "t",
        "finish_reason": "stop",
        "truncated": False,
        "images": (),
        "messages": (json.dumps({"role": "user", "parts": [{"type": "text", "content": "go on"}]}),),
        "output": text,
        "action": None,
        "parse_error": None,
        "cached_tokens": None,
    }
    return {**known, **more}


def begun(recorder: Recorder, number: int = 0, **more: Any) -> EpisodeRecorder:
    known: dict[str, Any] = {"problem_id": f"p/{number}", "task": "hand", "graph": "monologue", "group_id": f"p/{number}", "gold": 0}
    return recorder.episode(**{**known, "question": f"question {number} ?", "choices": ("red", "blue"), "family": "plain", **more})


def rich(recorder: Recorder) -> str:
    """An episode with region, patches, tool, fault, rewards, entropies and advantages; returns its id."""
    with begun(recorder, 0, question="which colour has the rich star ?", family="rich") as episode:
        picture = episode.store(Image.new("RGB", (120, 80), (200, 60, 40)))
        look = {"kind": "look", "question": "the star ?", "region": [0.25, 0.25, 0.75, 0.5]}
        with episode.policy(role="questioner", node="ask") as call:
            call.record(**facts("look !", logprobs=LOGPROBS, action=json.dumps(look)))
            call.span.set_attribute(names.SAMPLED_ENTROPIES, pack_floats([0.5, 1, 2, 0, 0.25, 3]))
            call.edge = "look"
            first = f"{call.span.get_span_context().span_id:016x}"
        with episode.policy(role="answerer", node="answer") as call:
            seen = ImageRef(picture.sha256, 120, 80, (1, 4, 6), 1, 6, "p")
            call.record(**facts("red", images=(seen,), action='{"kind": "reply", "text": "red"}'))
            call.span.set_attribute(names.ATTENTION, json.dumps([pack_floats([0.1, 0.9, 0.0, 0.2, 0.3, 0.4])]))
            call.edge = "reply"
        with episode.tool(name="calculator", arguments={"expression": "6*7"}, node="tools") as tool:
            tool.result = "forty-two"
        with episode.policy(role="questioner", node="ask") as call:
            call.record(**facts("mumble", parse_error="no action was found", truncated=True))
            call.edge = "conclude"
        episode.annotate(name="exact_match", value=1.0, source="task:hand")
        episode.annotate(name="brevity", value=-0.25, source="task:hand", weight=0.5, scope="turn", span_id=first)
        note = {"name": "advantage", "value": None, "text": None, "weight": 0.0, "scope": "token", "role": None, "source": "grpo"}
        values = pack_floats(ADVANTAGES)
        recorder.run.annotate(Annotation(episode_id=episode.id, span_id=first, created_ns=1, values=values, **note))  # type: ignore[arg-type]
        episode.finish("red")
    return episode.id


def hostile(recorder: Recorder, number: int = 1) -> str:
    """An episode in which every text is hostile; returns its id."""
    everything = " ".join(HOSTILE[:-1])
    with begun(recorder, number, question=everything, choices=HOSTILE[:2], family=HOSTILE[0], gold=1) as episode:
        with episode.policy(role=HOSTILE[1], node=HOSTILE[0]) as call:
            call.record(**facts(everything, action=json.dumps({"kind": HOSTILE[0], HOSTILE[1]: HOSTILE[4]}), parse_error=HOSTILE[1]))
            call.edge = HOSTILE[1]
        with episode.policy(role="huge", node="ask") as call:
            call.record(**facts(HOSTILE[-1], ids=[1, 2, 3], tokenizer_hash="unknown"))
        with episode.tool(name=HOSTILE[0], arguments={HOSTILE[1]: HOSTILE[0]}, node="tools") as tool:
            tool.result = everything
        episode.annotate(name=HOSTILE[0], value=1.0, text=everything, source=HOSTILE[1])
        episode.finish(everything)
    return episode.id


def plain(recorder: Recorder, number: int, sample: int = 0, answer: str | None = "red") -> str:
    with begun(recorder, number, sample_index=sample) as episode:
        with episode.policy(role="questioner", node="ask") as call:
            call.record(**facts(f"answer {answer} said {number}"))
            call.edge = "conclude"
        episode.annotate(name="exact_match", value=float(answer == "red"), source="task:hand")
        episode.finish(answer)
    return episode.id


def failed(recorder: Recorder, number: int) -> str:
    episode = begun(recorder, number)
    try:
        with episode, episode.policy(role="questioner", node="ask"):
            raise ValueError("the engine fell over")
    except ValueError:
        pass
    return episode.id


def mixed(folder: Path) -> dict[str, Any]:
    """A run with one of each and a group of three; returns ids by name."""
    run = RunWriter(folder)
    recorder = Recorder(run)
    ids: dict[str, Any] = {"rich": rich(recorder), "hostile": hostile(recorder)}
    ids["group"] = [plain(recorder, 2, sample, answer) for sample, answer in enumerate(("red", "blue", None))]
    ids["failed"] = failed(recorder, 3)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / (s + 1), "stage": "grpo"}) + "\n" for s in range(900)))
    run.close()
    return ids


def many(folder: Path, count: int) -> None:
    """A run of ``count`` small episodes, written without a recorder: fast."""
    run = RunWriter(folder)
    call = facts("yes")
    from monologue.traces.schema import attributes_of

    attributes = attributes_of({**call, "prompt_delta": (1, 2, 3), "prompt_length": 3, "prefix_length": None, "prefix_break": None})
    seat = {names.ROLE: "questioner", names.NODE: "ask", names.STREAM: "questioner", names.TURN: 0}
    for number in range(count):
        key, root, span = secrets.token_hex(16), secrets.token_hex(8), secrets.token_hex(8)
        run.write(start(key, root, number))
        run.write(step(key, root, span, {**attributes, **seat}))
        end = {"ended_ns": number + 3, "status": "ok", "answer": "red", "error": None, "calls": 1, "spans": 1, "turns": 1}
        run.write(EpisodeEnd(episode_id=key, **end))  # type: ignore[arg-type]
    run.close()


def start(key: str, root: str, number: int) -> EpisodeStart:
    facts = {
        "problem_id": f"p/{number}",
        "task": "hand",
        "graph": "monologue",
        "group_id": f"p/{number}",
        "question": f"question {number} ?",
    }
    rest = {
        "sample_index": 0,
        "attempt": 0,
        "started_ns": number,
        "choices": ("red", "blue"),
        "gold": number % 2,
        "family": "f",
        "extra": {},
    }
    return EpisodeStart(run_id="r", episode_id=key, root_span_id=root, **facts, **rest)  # type: ignore[arg-type]


def step(key: str, root: str, span: str, attributes: dict[str, Any]) -> SpanRecord:
    facts = {"seq": 0, "name": "chat questioner", "kind": "policy", "status": "ok", "start_ns": 1, "end_ns": 2}
    return SpanRecord(episode_id=key, trace_id=key, span_id=span, parent_id=root, attributes=attributes, **facts)  # type: ignore[arg-type]
