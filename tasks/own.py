"""A person's own picture and question as a problem without gold.

Everything that can be wrong with them is said here in one sentence, before any model is loaded: length, control characters, choices that
are missing, empty or given twice. The picture itself is opened by whoever plays it, through the limits of ``monologue.traces.images``.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence

from PIL.Image import Image

from monologue.tasks.base import Problem, TaskError

LONGEST = 4000
"""Characters of a question."""


def own_problem(picture: Callable[[], Image], question: str, choices: Sequence[str]) -> Problem:
    """One problem from a person. Raises TaskError for a question or choices that cannot be played."""
    question, choices = question.strip(), tuple(choice.strip() for choice in choices)
    _check_text("question", question)
    if not choices:
        raise TaskError("no choices; give two or more answers to choose from")
    for choice in choices:
        _check_text("choice", choice)
    lowered = [choice.lower() for choice in choices]
    twice = sorted({choice for choice in lowered if lowered.count(choice) > 1})
    if twice:
        raise TaskError(f"choices must differ; {', '.join(map(repr, twice))} is given more than once")
    if len(choices) < 2:
        raise TaskError(f"one choice, {choices[0]!r}, leaves nothing to choose; give two or more")
    image = picture()
    pixels = hashlib.sha256(image.tobytes()).hexdigest()
    key = hashlib.sha256("\n".join((question, *choices, f"{image.size}", pixels)).encode()).hexdigest()[:12]
    return Problem(f"own/{key}", "own", question, choices, None, (picture,), family="own")


def _check_text(name: str, text: str) -> None:
    if not text:
        raise TaskError(f"the {name} is empty; write what is to be asked")
    if len(text) > LONGEST:
        raise TaskError(f"the {name} has {len(text)} characters; the longest allowed is {LONGEST}")
    bad = sorted({f"U+{ord(c):04X}" for c in text if unicodedata.category(c) in ("Cc", "Cs")})
    if bad:
        raise TaskError(f"the {name} holds control characters or broken ones ({', '.join(bad)}); write plain text on one line")
