"""Written dialogues from files, to be played as they stand and imitated: the shape of IMMO's first corpus, whoever wrote yours.

A folder holds ``SPLIT*.jsonl``, one problem a line, pictures as in ``monologue.tasks.corpora``:

    {"question": "What will fall first?", "choices": ["the cup", "the book"], "answer": 1, "image": "images/426.png",
     "turns": [{"question": "What leans over the edge?", "reply": "The book does."}], "id": "426", "family": "commonsense"}

``answer`` is an index or the choice's own text; ``id`` and ``family`` may be missing, further keys are left alone. The turns become
``Problem.oracle``, so an oracle plays them through any graph, codec and recorder that it plays a generated world's through; nothing else
had to be made for imitation. The conclusion is the gold answer and stands in no turn. A turn has a question and a reply, both with words in
them: an answer to nothing would teach the questioner to be silent.

Corpora leave items out; here a line that is not as above is refused with its file and number, since somebody wrote these files for us
and would not notice what is missing. Only whether a picture can be decoded is found when it is looked at, in the same words. Left out:
Parquet, several pictures, explanations before a conclusion (a questioner would learn to recite the rationale that its dialogue came from).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from monologue.tasks.base import OracleTurn, Problem, TaskError, exact_match
from monologue.tasks.corpora import SPLITS, Decode, json_lines, picture_source, plain_decode


def turns_of(found: Any) -> tuple[OracleTurn, ...]:
    """A dialogue's turns from their JSON form. Raises ValueError that says what was expected and what came."""
    if not isinstance(found, list) or not found:
        raise ValueError(f'expected "turns", a list of one or more {{"question": ..., "reply": ...}}, got {found!r:.80}')
    for number, turn in enumerate(found, 1):
        if not isinstance(turn, dict) or set(turn) != {"question", "reply"}:
            raise ValueError(f'expected turn {number} as {{"question": ..., "reply": ...}} with no other keys, got {turn!r:.80}')
    return tuple(
        OracleTurn(*(words(turn[name], f"the {name} of turn {number}") for name in ("question", "reply")))
        for number, turn in enumerate(found, 1)
    )


def words(found: Any, name: str) -> str:
    """Text that says something and can be written as UTF-8. Raises ValueError."""
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"expected words as {name}, got {found!r:.80}")
    found.encode()  # JSON can spell halves of characters
    return found.strip()


def gold_of(answer: Any, choices: tuple[str, ...]) -> int:
    """The index that is meant by an index, or by a choice's own text. Raises ValueError."""
    if isinstance(answer, str) and choices.count(answer.strip()) == 1:
        return choices.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise ValueError(f'expected "answer", an index from 0 to {len(choices) - 1} or the text of one choice, got {answer!r:.80}')


def asked_of(record: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    """Question, choices and index of the gold answer. Raises ValueError."""
    question, choices = words(record.get("question"), '"question"'), record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f'expected "choices", a list of two or more texts, got {choices!r:.80}')
    found = tuple(words(choice, f"choice {number}") for number, choice in enumerate(choices))
    return question, found, gold_of(record.get("answer"), found)


class Dialogues:
    """Problems with dialogues that somebody wrote, from a folder."""

    name = "dialogues"
    splits = SPLITS

    def __init__(self, folder: str | Path, decode: Decode = plain_decode) -> None:
        """Raises TaskError for a folder that is not there."""
        if not Path(folder).is_dir():
            raise TaskError(f"expected a folder with dialogues (train*.jsonl), got {str(folder)!r}")
        self._folder, self._decode = Path(folder), decode

    def problems(self, split: str, n: int | None = None, seed: int = 0) -> Iterator[Problem]:
        """The first ``n`` problems of a split; ``seed`` changes nothing. Raises TaskError."""
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r} of task {self.name!r}; choose from {', '.join(SPLITS)}")
        files = sorted(self._folder.glob(f"{split}*.jsonl"))
        if not files:
            raise TaskError(f"expected {split}*.jsonl in {str(self._folder)!r}, found none")
        lines = itertools.chain.from_iterable(map(json_lines, files))
        found = (self._problem(f"{self.name}/{split}/{index}", *line) for index, line in enumerate(lines))
        return itertools.islice(found, n)

    def score(self, problem: Problem, answer: str | None) -> float:
        return exact_match(problem, answer)

    def _problem(self, name: str, where: str, record: dict[str, Any]) -> Problem:
        try:
            (question, choices, gold), turns = asked_of(record), turns_of(record.get("turns"))
            if not isinstance(record.get("image"), str | dict):
                raise ValueError(f'expected "image", a path in the folder or {{"bytes": base64}}, got {record.get("image")!r:.80}')
        except ValueError as error:
            raise TaskError(f"{where} is no dialogue: {error}") from error
        picture = partial(self._picture, picture_source(record["image"], self._folder, where), where)
        about = {"id": record.get("id", ""), "line": where}
        family = str(record.get("family") or "")
        return Problem(name, self.name, question, choices, gold, (picture,), family=family, oracle=turns, extra=about)

    def _picture(self, source: bytes | Path, where: str) -> Image.Image:
        try:
            return self._decode(source if isinstance(source, bytes) else source.read_bytes(), f"the picture of {where}")
        except (OSError, ValueError) as error:
            raise TaskError(f"{where} has a picture that cannot be opened: {error}") from error
