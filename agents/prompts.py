"""Every string that a model of ours is shown, one record per language, so that wording is changed in one place.

``CHAT`` speaks English to instruction-tuned models. ``TINY`` uses nothing but words of the starter policies' vocabulary, and
says nothing that they were not trained to hear except in the corrections.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wording:
    """What is said around a problem; empty strings are not said at all."""

    questioner: str
    """System message of the seat that asks and concludes."""
    answerer: str
    """System message of the seat that sees the picture and answers."""
    direct: str
    """System message of a policy that sees the picture and answers the problem at once."""
    caption: str
    """What the answerer is asked when a whole caption is wanted."""
    captioned: str
    """The question with a caption before it: ``{caption}`` and ``{question}``."""
    fault: str
    """Correction after a reply that is no action: may use ``{reason}``."""
    unanswered: str
    """Told to the questioner when the answerer's reply was no answer: may use ``{reason}``."""


CHAT = Wording(
    questioner=(
        "You answer a question about a picture that you cannot see. Somebody else sees it. "
        "Call the tool `look` to ask them one short, concrete question about the picture; do so as often as you need. "
        "When you are sure, call the tool `conclude` with your answer; where choices are given, it must be one of them, "
        "word for word. Make exactly one call in each turn and say nothing else."
    ),
    answerer=(
        "You see a picture. Answer each question about it in as few words as possible, from what is visible. "
        "If the picture does not tell, say: unknown."
    ),
    direct="You see a picture. Answer the question about it with one of the choices, word for word, and nothing else.",
    caption="Describe everything in the picture: every object with its properties and its place.",
    captioned="Description of the picture: {caption}\nQuestion: {question}",
    fault="That was not a valid action: {reason} Make exactly one valid call.",
    unanswered="There was no answer: {reason} Ask another question.",
)

TINY = Wording(
    questioner="",
    answerer="",
    direct="",
    caption="describe the picture",
    captioned="{caption} {question}",
    fault="please look or answer again",
    unanswered="no answer , please look again",
)

HERMES = """\
You may call these functions; their signatures are given as JSON:
<tools>
{tools}
</tools>
Call one by answering with its name and arguments as JSON between tags:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""
"""Explains tool calls to models whose chat template does not."""

CHOICES = "\nChoices: {choices}"
"""Appended to the question for chat models."""
