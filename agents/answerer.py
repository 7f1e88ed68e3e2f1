"""The seat that sees the picture and answers in words: what it hears, what it may do.

It keeps its own stream: the picture is shown once, later questions follow it. ``direct`` is the same seat asked the problem
itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from monologue.agents.messages import Message, Reply
from monologue.agents.prompts import Wording
from monologue.backends.base import Picture

KINDS = (Reply,)
"""The actions of this seat."""


def opening(wording: Wording, question: str, pictures: Sequence[Picture]) -> list[Message]:
    """The pictures and the first question."""
    return [*_system(wording.answerer), Message("user", question, tuple(pictures))]


def asked(question: str, enlarged: Sequence[Picture] = ()) -> list[Message]:
    """A later question; ``enlarged`` shows part of a picture again, larger."""
    return [Message("user", question, tuple(enlarged))]


def direct(wording: Wording, question: str, choices: Sequence[str], pictures: Sequence[Picture]) -> list[Message]:
    """The problem in one shot."""
    return [*_system(wording.direct), Message("user", question, tuple(pictures), tuple(choices))]


def _system(text: str) -> list[Message]:
    return [Message("system", text)] if text else []
