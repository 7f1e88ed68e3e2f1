"""``monologue rewrite``: human rationales as dialogues to imitate, by a hosted chat model, as IMMO made the corpus of its first stage.

The model is told the question, the choices, the answer and the rationale, and shown no picture: all that the dialogue may say of the
picture stands in the rationale, and nothing is uploaded that a person did not write. It returns turns alone. The conclusion is the corpus's
own answer, which nobody is asked for, so no model can change it.

A reply is read strictly (``turns_of``) and never mended. One that does not fit is told why and asked for once more; then its problem goes
into ``failed.jsonl`` with the reason and the last words. ``SPLIT.jsonl`` is what the task ``dialogues`` reads, a line as soon as it is
there, pictures under ``images/``. The same command goes on where it stopped: what is written is not asked again, what failed is. Calls are
tried again by ``ChatBackend``; some failed ones in a row, without a reply between them (a wrong key, no network), end the command.
Left out: whether a dialogue is true to its rationale, and whether it gives the answer away early. Read some before you train on them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monologue.commands import warn_of_uploads
from monologue.tables import clean
from monologue.tasks.base import OracleTurn, Problem, TaskError, taken
from monologue.tasks.corpora import Corpus, json_lines
from monologue.tasks.dialogues import asked_of, turns_of
from monologue.traces.images import PictureError, decode, keep
from monologue.traces.png import png_bytes
from monologue.usage import UsageError

if TYPE_CHECKING:
    from monologue.backends.chat import ChatBackend

MOST_TURNS = 7
"""With its conclusion such a dialogue fits the eight actions that ``monologue play`` gives it."""
IN_A_ROW = 5
"""Failed calls, without a reply between them, that end the command."""
PROMPT = f"""You rewrite a person's rationale as a dialogue between a questioner and an answerer about one picture.
The questioner knows the question and the choices and cannot see the picture. It asks short questions, one thing at a time, each of which
can be understood by itself and follows from what it has heard so far. The answerer sees the picture, not the question, and replies to each
question in a short sentence. Say only what the rationale says or what follows from it. After the last reply the questioner must be able
to conclude with the given answer by itself: do not write the conclusion, and do not let a question name the answer as known.
Write 1 to {MOST_TURNS} turns. Reply with one JSON object and nothing before or after it, no code fence:
{{"turns": [{{"question": "...", "reply": "..."}}, ...]}}"""


class NoDialogue(ValueError):
    """Why a rationale did not become a dialogue, and the model's last words."""

    def __init__(self, reason: str, reply: str = "") -> None:
        super().__init__(reason)
        self.reply = reply


def rewrite(options: argparse.Namespace) -> int:
    """Rewrites a corpus, or what is missing of it; 1 where some of it failed. Raises UsageError, TaskError, BackendError."""
    if not options.model.startswith("chat:"):
        raise UsageError(f"--model names a hosted chat model, chat:PROVIDER:MODEL, got {options.model!r}")
    for name in ("n", "concurrency"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UsageError(f"--{name} must be at least 1, got {given}")
    warn_of_uploads()
    problems = taken(Corpus(options.task, options.folder, decode), options.split, options.n)
    engine = _engine(options.model)
    pages = Pages(options.out, options.split, options.model.removeprefix("chat:"))
    missing = pages.missing(problems)
    failed = asyncio.run(_rewrite(engine, missing, pages, options.concurrency))
    before = f"; {len(problems) - len(missing)} were there before" if len(missing) < len(problems) else ""
    print(f"{len(missing) - failed} rationales rewritten, {failed} failed{before}")
    if failed:
        print(f"failed:    {pages.failed}, the last one: {clean(_lines(pages.failed)[-1]['reason'])[:300]}")
    if written := len(_lines(pages.file)):
        print(f"dialogues: {pages.file}")
        told = f"--task dialogues --folder {options.out} --split {options.split} --n {written}"
        print(f"play:      monologue play {told} --backend scripted --out runs/corpus")
    return 1 if failed else 0


def _engine(named: str) -> ChatBackend:
    """The model, its replies as bytes."""
    from monologue.agents.hosted import Marked
    from monologue.backends.chat import ChatBackend
    from monologue.seating import chat_model

    model = chat_model(named.removeprefix("chat:"), "--model chat:")
    return ChatBackend(model, lambda said, _: tuple(said.text.encode()), Marked(), tokenizer_hash="bytes", template_hash="none")


async def _rewrite(engine: ChatBackend, problems: list[Problem], pages: Pages, concurrency: int) -> int:
    """How many failed."""
    from monologue.backends.base import BackendError

    left, failed, row = iter(problems), 0, 0

    async def work() -> None:
        nonlocal failed, row
        for problem in left:  # the workers share it
            try:
                await _one(engine, problem, pages)
                row = 0
            except (NoDialogue, BackendError) as error:
                failed += 1
                row = row + 1 if isinstance(error, BackendError) else 0
                pages.fail(problem, error)
                if row == IN_A_ROW:
                    told = f"{row} calls in a row brought no reply, so nothing more is asked; the same command goes on. The last: {error}"
                    raise BackendError(told) from error

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return failed


async def _one(engine: ChatBackend, problem: Problem, pages: Pages) -> None:
    """Writes one problem's dialogue. Raises NoDialogue, BackendError."""
    record = {"id": problem.id, "question": problem.question, "choices": list(problem.choices), "answer": problem.gold}
    if not problem.explanation:
        raise NoDialogue("the corpus has no rationale here")
    try:
        asked_of(record)
        image = pages.keep(problem)
    except (PictureError, TaskError, ValueError) as error:
        raise NoDialogue(str(error)) from error
    pages.write({**record, "family": problem.family, "image": image, "turns": await _turns(engine, problem)})


async def _turns(engine: ChatBackend, problem: Problem) -> list[dict[str, str]]:
    """The turns of a reply that fits, which is asked for twice at most. Raises NoDialogue, BackendError."""
    from monologue.backends.base import Prompt, Sampling, Spoken

    told = {"Question": problem.question, "Choices": " | ".join(problem.choices), "Answer": problem.choices[problem.gold or 0]}
    asked = "\n".join(f"{name}: {text}" for name, text in {**told, "Rationale": problem.explanation}.items())
    said = [{"role": "system", "content": PROMPT}, {"role": "user", "content": asked}]
    for last in (False, True):
        generation = await engine.generate(Prompt((), spoken=Spoken(tuple(said))), Sampling())
        reply = bytes(generation.ids).decode()
        try:
            return [{"question": turn.question, "reply": turn.reply} for turn in dialogue_of(reply)]
        except ValueError as error:
            reason = f"{error}; it was cut off at its length" if generation.finish_reason == "length" else str(error)
            if last:
                raise NoDialogue(reason, reply) from error
        said += [{"role": "assistant", "content": reply or "(nothing)"}, {"role": "user", "content": f"That does not fit: {reason}."}]
    raise AssertionError("unreachable")


def dialogue_of(reply: str) -> tuple[OracleTurn, ...]:
    """The turns that a reply says. Raises ValueError for anything but the one form that ``PROMPT`` asks for."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected one JSON object and nothing around it, got {reply[:80]!r} ({error})") from error
    if not isinstance(found, dict) or set(found) != {"turns"}:
        raise ValueError(f'expected an object with the one key "turns", got {reply[:80]!r}')
    turns = turns_of(found["turns"])
    if len(turns) > MOST_TURNS:
        raise ValueError(f"expected at most {MOST_TURNS} turns, got {len(turns)}")
    return turns


class Pages:
    """What is on disk: dialogues, pictures, failures."""

    def __init__(self, folder: Path, split: str, model: str) -> None:
        """Raises UsageError for a folder that cannot be made."""
        self.file, self.failed, self._images, self._model = folder / f"{split}.jsonl", folder / "failed.jsonl", folder / "images", model
        try:
            self._images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {str(self._images)!r}: {error.strerror}; name a folder that you may write to") from error

    def missing(self, problems: list[Problem]) -> list[Problem]:
        """Those that are not written yet; they are asked, so what is told of their failures goes. Raises UsageError, TaskError."""
        written = {record.get("id"): record.get("question") for record in _lines(self.file)}
        for problem in problems:
            if written.get(problem.id, problem.question) != problem.question:
                raise UsageError(f"{str(self.file)!r} holds another {problem.id!r} than this corpus; name another --out")
        missing = [problem for problem in problems if problem.id not in written]
        asked = {problem.id for problem in missing}
        others = [record for record in _lines(self.failed) if record.get("id") not in asked]
        part = self.failed.with_suffix(".part")
        part.write_text("".join(json.dumps(record) + "\n" for record in others))
        os.replace(part, self.failed)
        return missing

    def keep(self, problem: Problem) -> str:
        """The problem's picture, copied; its path in the folder. Raises PictureError, TaskError."""
        return f"images/{keep(self._images, png_bytes(problem.pictures[0]()))}.png"

    def write(self, record: dict[str, Any]) -> None:
        _append(self.file, {**record, "model": self._model})

    def fail(self, problem: Problem, error: Exception) -> None:
        _append(self.failed, {"id": problem.id, "reason": str(error), "reply": getattr(error, "reply", ""), "model": self._model})


def _append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a") as pages:
        pages.write(json.dumps(record) + "\n")


def _lines(file: Path) -> list[dict[str, Any]]:
    """What a file holds; a last line that a kill cut off is taken away, so that the next one does not grow out of it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)
    return [record for _, record in json_lines(file)]
