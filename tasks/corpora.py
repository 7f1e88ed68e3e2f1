"""ScienceQA and M3CoT from files on disk, in the columns in which their authors publish them on the Hub; nothing is ever fetched.

    ScienceQA   derek-thomas/ScienceQA: question, choices, answer (index), image, lecture, solution, subject, topic ...
    M3CoT       LightChen2333/M3CoT: id, question, choices, answer (letter), image, rationale, domain, topic ...

A folder holds ``SPLIT*.jsonl`` or ``SPLIT*.parquet`` (the latter needs the package ``datasets``). A picture is what ``datasets`` makes of
one: ``{"bytes": ..., "path": ...}``; in JSON lines the bytes are base64, or a path stands alone, relative to the folder. Items without a
picture are left out, as IVT-LR leaves them out. A rationale stands in ``Problem.explanation``, cut into ``Problem.extra["steps"]`` by the
rule of the IVT-LR paper's release (``split_rationale``).

How a picture is decoded is the caller's business (``decode``: bytes and a name in, RGB picture out), since limits on strangers' files are
kept in one place, ``monologue.traces.images``, which this room does not know.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from monologue.tasks.base import Problem, TaskError, exact_match

SPLITS = ("train", "validation", "test")
MOST_STEPS = 3
Decode = Callable[[bytes, str], Image.Image]


def split_rationale(text: str, most: int = MOST_STEPS) -> tuple[str, ...]:
    """A rationale in at most ``most`` steps, as IVT-LR's release does it: newlines become spaces, sentences end at ``". "``, an empty tail
    is dropped, and more than ``most`` sentences are joined again into that many contiguous groups of near-equal count, the first longer.
    """
    pieces = text.replace("\n", " ").strip().split(". ")
    if pieces[-1] == "":
        pieces.pop()
    if len(pieces) <= most:
        return tuple(pieces)
    size, longer = divmod(len(pieces), most)
    cuts = [0, *itertools.accumulate(size + (group < longer) for group in range(most))]
    return tuple(". ".join(pieces[start:end]) for start, end in itertools.pairwise(cuts))


def science_rationale(record: dict[str, Any]) -> str:
    """Lecture and solution, one after the other; either may be missing. (Where both are, the release learns to say the answer's index as if
    it were a rationale; here there are no steps then.)
    """
    return " ".join(part.strip() for part in (record.get("lecture") or "", record.get("solution") or "") if part.strip())


def plain_decode(data: bytes, name: str) -> Image.Image:
    """Pillow's own, with its own limits."""
    return Image.open(io.BytesIO(data)).convert("RGB")


class Corpus:
    """Problems with rationales, from a folder."""

    splits = SPLITS

    def __init__(self, name: str, folder: str | Path, decode: Decode = plain_decode) -> None:
        """Raises TaskError for a corpus that is not known or a folder that is not there."""
        if name not in CORPORA:
            raise TaskError(f"unknown corpus {name!r}; choose from {', '.join(CORPORA)}")
        if not Path(folder).is_dir():
            raise TaskError(f"expected a folder with {name}'s files (train*.jsonl or train*.parquet), got {str(folder)!r}")
        self.name, self._folder, self._decode = name, Path(folder), decode

    def problems(self, split: str, n: int | None = None, seed: int = 0) -> Iterator[Problem]:
        """The first ``n`` problems of a split that have a picture; ``seed`` changes nothing. Raises TaskError."""
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r} of task {self.name!r}; choose from {', '.join(SPLITS)}")
        found = (self._problem(split, i, record) for i, record in enumerate(self._records(split)) if record.get("image") is not None)
        return itertools.islice(found, n)

    def score(self, problem: Problem, answer: str | None) -> float:
        return exact_match(problem, answer)

    def _records(self, split: str) -> Iterator[dict[str, Any]]:
        files = sorted(path for path in self._folder.glob(f"{split}*") if path.suffix in (".jsonl", ".parquet"))
        if not files:
            raise TaskError(f"expected {split}*.jsonl or {split}*.parquet in {str(self._folder)!r}, found neither")
        for path in files:
            yield from (record for _, record in json_lines(path)) if path.suffix == ".jsonl" else _table(path)

    def _problem(self, split: str, index: int, record: dict[str, Any]) -> Problem:
        where = f"{self.name}/{split}/{index}"
        rationale_of, gold_of, about = CORPORA[self.name]
        try:
            choices = tuple(choice.strip() for choice in record["choices"])
            gold, rationale = gold_of(record["answer"]), rationale_of(record)
            if not 0 <= gold < len(choices):
                raise ValueError(f"answer {record['answer']!r} is none of {len(choices)} choices")
            picture = partial(self._picture, record["image"], where)
            steps = split_rationale(rationale) if rationale else ()
            family = str(record.get(about) or "")
            extra = {"id": record.get("id", ""), "steps": list(steps)}
            question = record["question"].strip()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TaskError(f"item {where} is not as {self.name} has it: {error!r}") from error
        return Problem(
            where, self.name, question, choices, gold, (picture,), family=family, explanation=" ".join(rationale.split()), extra=extra
        )

    def _picture(self, found: Any, where: str) -> Image.Image:
        source = picture_source(found, self._folder, where)
        return self._decode(source if isinstance(source, bytes) else source.read_bytes(), f"the picture of {where}")


def picture_source(found: Any, folder: Path, where: str) -> bytes | Path:
    """The bytes of a picture that lies in its record, or the file inside the folder that the record names. Raises TaskError."""
    data, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (None, found)
    if isinstance(data, bytes):
        return data
    if data is not None:
        try:
            return base64.b64decode(data, validate=True)
        except (TypeError, ValueError) as error:
            raise TaskError(f"expected the picture of {where} as base64, got {data!r:.60}: {error}") from error
    try:
        place = (folder / str(path)).resolve()
        there = folder.resolve() in place.parents and place.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise TaskError(f"expected the picture of {where} inside {str(folder)!r}, got {str(path)[:200]!r}")
    return place


def _letter(answer: str) -> int:
    if len(answer.strip()) != 1:
        raise ValueError(f"expected a letter for the answer, got {answer!r}")
    return ord(answer.strip().upper()) - ord("A")


CORPORA: dict[str, tuple[Callable[[dict[str, Any]], str], Callable[[Any], int], str]] = {
    "scienceqa": (science_rationale, int, "subject"),
    "m3cot": (lambda record: str(record["rationale"] or ""), _letter, "domain"),
}
"""Rationale, index of the gold answer, and the column that names a question's family, by corpus."""


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object with the words that name the line. Raises TaskError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"line {number} of {str(path)!r}"
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise TaskError(f"{where} is no JSON in UTF-8: {error}") from error
            if not isinstance(record, dict):
                raise TaskError(f"{where} is no JSON object: {record!r:.80}")
            yield where, record


def _table(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise TaskError(f"reading {str(path)!r} needs pyarrow; pip install 'monologue[datasets]'") from error
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(64):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise TaskError(f"{str(path)!r} cannot be read as Parquet: {error}") from error
