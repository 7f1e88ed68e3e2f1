"""What is asked of a tokenizer, its hash, and a tiny reversible tokenizer that needs nothing installed.

The hash says whether two runs speak the same ids: it covers the canonical JSON of the tokenizer without its padding and
truncation settings, which the Hugging Face classes change behind one's back when they are called.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

SPECIALS = (
    *("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<tool>", "<look>", "<conclude>", "<because>", "<choice>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
"""The starter family's special tokens, in the order of their ids."""


class Tokenizer(Protocol):
    """The part of ``PreTrainedTokenizerFast`` that codecs and the scripted engine use; any object with these two will do."""

    def encode(self, text: str, /, **options: Any) -> list[int]: ...

    def decode(self, ids: Sequence[int], /, **options: Any) -> str: ...


class ByteTokenizer:
    """One id for each special string and for every other byte of UTF-8: ``decode(encode(text)) == text`` for any text."""

    def __init__(self, specials: Sequence[str] = SPECIALS) -> None:
        self.specials = tuple(specials)
        self._vocabulary = {piece: index for index, piece in enumerate(self.specials)}
        self._split = re.compile("(" + "|".join(re.escape(s) for s in sorted(self.specials, key=len, reverse=True)) + ")")

    def __len__(self) -> int:
        return len(self.specials) + 256

    def encode(self, text: str, /, **options: Any) -> list[int]:
        base, ids = len(self.specials), list[int]()
        for piece in self._split.split(text) if self.specials else [text]:
            special = self._vocabulary.get(piece)
            ids += [base + byte for byte in piece.encode()] if special is None else [special]
        return ids

    def decode(self, ids: Sequence[int], /, **options: Any) -> str:
        base, raw = len(self.specials), bytearray()
        for token in ids:
            raw += self.specials[token].encode() if token < base else bytes([token - base])
        return raw.decode(errors="replace")

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Id of a special token; None for anything else."""
        return self._vocabulary.get(token)

    def to_str(self) -> str:
        """Canonical JSON, the stuff of its hash."""
        return json.dumps({"type": "bytes", "specials": self.specials})


def tokenizer_hash(tokenizer: object) -> str:
    """SHA-256 of what decides the ids; of the class name where a tokenizer cannot be written down."""
    core = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(core, "to_str"):
        return hashlib.sha256(f"{type(core).__module__}.{type(core).__qualname__}".encode()).hexdigest()
    facts = json.loads(core.to_str())
    for setting in ("padding", "truncation"):
        facts.pop(setting, None)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def template_hash(template: object) -> str:
    """SHA-256 of a chat template (text, or several by name); of the empty text where there is none."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True) if template else ""
    return hashlib.sha256(text.encode()).hexdigest()
