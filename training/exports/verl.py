"""A run as verl's two documented parquet files, one of each a role.

``ROLE.rl.parquet``, for reinforcement learning: one row a problem (``data_source, prompt, images, ability, reward_model, extra_info``).
Its prompt is what the seat heard before anybody had said anything; a seat that first hears another seat's words (the answerer of a
monologue) has no prompt of its own, and is refused. verl samples and scores anew: name a reward function to it
(``custom_reward_function``) that compares a reply with ``reward_model.ground_truth``.

``ROLE.sft.retokenised.parquet``, for imitation: ``messages``, and ``images`` where the seat sees, of the kept rows. verl's
``MultiTurnSFTDataset`` takes no ids: it puts every message through the checkpoint's chat template, so what is trained on is said
again and not what was sampled. Exact rows go to TRL (text) or verifiers.

Pictures stand where the text says ``<image>``, which is how verl finds them; a text of the problem that says so itself is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from monologue.traces.store import Episode, RunReader
from monologue.training.exports.dialogue import Turn, dialogue, heard, unsayable
from monologue.training.exports.writing import (
    ExportError,
    Report,
    Told,
    chosen,
    libraries,
    origin,
    origin_features,
    picture_file,
    safe,
    told,
    write_parquet,
)

PLACES = ("<image>", "<video>", "<audio>")
"""What verl reads as the place of a picture, film or sound."""


def to_verl(run: str | Path, out: str | Path, roles: Iterable[str] | None = None, keep: str = "solved") -> Report:
    """Writes the files of each role; ``keep`` is about imitation, problems are all kept. A role without prompts of its own gets no
    file of problems, which the report says. Raises RunError, MissingExtra, ExportError.
    """
    datasets, *_ = libraries()
    report, reader = Report(), RunReader(run)
    openers = {calls[0].role for episode in reader.episodes() if episode.complete and (calls := episode.calls())}
    for role, sees in chosen(reader, roles).items():
        if role in openers:
            name = f"{safe(role)}.rl.parquet"
            report.files[name] = write_parquet(Path(out) / name, _rl_features(datasets, sees), _problems(reader, role, sees, report))
        else:
            report.left_out[f"{role}: problems as prompts, since this seat first hears what another says"] += 1
        name = f"{safe(role)}.sft.retokenised.parquet"
        rows = _dialogues(told(reader, role, keep, report), reader, report, sees)
        report.files[name] = write_parquet(Path(out) / name, _sft_features(datasets, sees), rows)
    return report


def _problems(reader: RunReader, role: str, sees: bool, report: Report) -> Iterator[dict[str, Any]]:
    """One example a problem, in the order of the run."""
    found: set[str] = set()
    for episode in reader.episodes():
        calls = episode.calls() if episode.complete else []
        if not calls or calls[0].role != role or episode.start.problem_id in found:
            continue
        if episode.start.gold is None:
            report.left_out[f"{role}: problem whose answer nobody knows"] += 1
            continue
        yield _problem(episode, heard(calls[0]), reader, len(found), sees)
        found.add(episode.start.problem_id)


def _problem(episode: Episode, turns: Sequence[Turn], reader: RunReader, index: int, sees: bool) -> dict[str, Any]:
    start = episode.start
    assert start.gold is not None
    facts = {"index": index, "problem_id": start.problem_id, "family": start.family, "question": start.question}
    return {
        "data_source": f"monologue/{start.task}",
        "prompt": [_message(turn) for turn in turns],
        **_pictures(turns, reader, sees),
        "ability": start.family or start.task,
        "reward_model": {"style": "rule", "ground_truth": start.choices[start.gold]},
        "extra_info": {**facts, "choices": list(start.choices)},
    }


def _dialogues(rows: Iterable[Told], reader: RunReader, report: Report, sees: bool) -> Iterator[dict[str, Any]]:
    for one in rows:
        cause = unsayable(one)
        if cause is None:
            turns = dialogue(one)
            yield {**origin(one.row), "messages": [_message(turn) for turn in turns], **_pictures(turns, reader, sees)}
        else:
            report.left_out[f"{one.row.role}: {cause}"] += 1


def _message(turn: Turn) -> dict[str, str]:
    if any(place in turn.text for place in PLACES):
        raise ExportError(f"a message says {turn.text!r}, which verl reads as the place of a picture, film or sound; leave that out")
    return {"role": turn.role, "content": "<image>" * len(turn.pictures) + turn.text}


def _pictures(turns: Sequence[Turn], reader: RunReader, sees: bool) -> dict[str, Any]:
    return {"images": [picture_file(reader, name) for turn in turns for name in turn.pictures]} if sees else {}


def _rl_features(datasets: Any, sees: bool) -> dict[str, Any]:
    text = datasets.Value("string")
    facts = {"index": datasets.Value("int64"), "problem_id": text, "family": text, "question": text, "choices": datasets.List(text)}
    return {
        "data_source": text,
        "prompt": datasets.List({"role": text, "content": text}),
        **_picture_features(datasets, sees),
        "ability": text,
        "reward_model": {"style": text, "ground_truth": text},
        "extra_info": facts,
    }


def _sft_features(datasets: Any, sees: bool) -> dict[str, Any]:
    text = datasets.Value("string")
    messages = datasets.List({"role": text, "content": text})
    return {**origin_features(datasets), "messages": messages, **_picture_features(datasets, sees)}


def _picture_features(datasets: Any, sees: bool) -> dict[str, Any]:
    return {"images": datasets.List(datasets.Image())} if sees else {}  # verl wants a processor as soon as there is this column
