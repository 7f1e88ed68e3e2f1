"""Every word and every sentence of the shapes world, in one place: questions, look-ups, replies.

Cells are named by row letter and column digit, ``a1`` at the top left. Numbers are digits. The vocabulary is closed; the starter
policies know these words and no others.
"""

from __future__ import annotations

from monologue.tasks.shapes.scene import ATTRIBUTES, CELLS, Wish

NOTHING, NOWHERE = "nothing", "nowhere"
DESCRIBE = "describe the picture"
ORDER = ("size", "fill", "colour", "shape")


def noun(wish: Wish, plural: bool = False) -> str:
    """``{"colour": "red"}`` reads "red object"; with a shape, "red star"."""
    words = [wish[name] for name in ORDER if name in wish]
    if "shape" not in wish:
        words.append("object")
    return " ".join(words) + ("s" if plural and words[-1] != "cross" else "es" if plural else "")


def ask_at(attribute: str, cell: str) -> str:
    return f"what {attribute} is at {cell} ?"


def ask_where(wish: Wish) -> str:
    return f"where is the {noun(wish)} ?"


def ask_count(wish: Wish) -> str:
    return f"how many {noun(wish, plural=True)} are there ?"


def ask_exists(wish: Wish) -> str:
    return f"is there a {noun(wish)} ?"


def ask_attribute(attribute: str, wish: Wish) -> str:
    return f"what {attribute} is the {noun(wish)} ?"


def wishes_of(kind: str) -> list[Wish]:
    """All wishes that name exactly one attribute."""
    return [{kind: value} for value in ATTRIBUTES[kind]]


VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *(value for values in ATTRIBUTES.values() for value in values),
            *ATTRIBUTES,
            *CELLS,
            *"0123456789",
            "object",
            "objects",
            *(noun(wish, plural=True) for wish in wishes_of("shape")),
            *["yes", "no", "nothing", "nowhere", "more", "fewer", "equal"],
            *[
                "what",
                "where",
                "is",
                "are",
                "how",
                "many",
                "there",
                "a",
                "an",
                "the",
                "at",
                "of",
                "to",
                "same",
                "as",
                "and",
                "or",
                "than",
                "if",
                "else",
                "then",
                "so",
                "not",
                "but",
            ],
            *[
                "left",
                "right",
                "above",
                "below",
                "have",
                "has",
                "with",
                "colours",
                "shapes",
                "altogether",
                "plus",
                "number",
                "it",
                "its",
                "in",
                "on",
                "picture",
            ],
            *[
                "which",
                "one",
                "does",
                "do",
                "cell",
                "empty",
                "describe",
                "without",
                "please",
                "again",
                "answer",
                "choose",
                "from",
                "following",
                "question",
                "look",
            ],
            *["?", ",", ".", ":", ";", "'", '"', "!", "(", ")", "-", "+"],
        ]
    )
)
