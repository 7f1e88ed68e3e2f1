"""What a token id says. The trace holds ids and the hash of the tokenizer that made them, not the text of each token.

A tokenizer file is believed only where its hash is the one in the trace: a wrong vocabulary would show plausible nonsense. Looked for in
``RUN/tokenizers``, in files that the user names, in the model's folder, and in the local Hugging Face cache. None found: the page shows
ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

LARGEST_FILE = 64 * 2**20
SPECIALS = "<pad> <bos> <eos> <unk> <user> <assistant> <tool> <look> <conclude> <because> <choice>"
VISUAL = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
BYTES: dict[str, Any] = {"type": "bytes", "specials": f"{SPECIALS} {VISUAL}".split()}
"""The scripted engine's tokenizer, which has no file."""
Speller: TypeAlias = "Callable[[int], str]"


class Pieces:
    """Tokenizers of one run by hash, each read once."""

    def __init__(self, run: Path, files: Sequence[Path] = ()) -> None:
        self._named = [*sorted((run / "tokenizers").glob("*.json")), *files]
        self._known: dict[str, tuple[Speller, str] | None] = {hash_of(BYTES): (_speller(BYTES), "")}

    def of(self, ids: Iterable[int], tokenizer_hash: str, model: str) -> list[str] | None:
        """One text per id; None where the tokenizer is not at hand."""
        found = self._tokenizer(tokenizer_hash, model)
        return None if found is None else [found[0](one) for one in ids]

    def gap(self, tokenizer_hash: str, model: str) -> str:
        """What stands between two tokens when they are read: a blank where tokens are whole words."""
        found = self._tokenizer(tokenizer_hash, model)
        return "" if found is None else found[1]

    def _tokenizer(self, wanted: str, model: str) -> tuple[Speller, str] | None:
        if wanted not in self._known:
            self._known[wanted] = self._find(wanted, model)
        return self._known[wanted]

    def _find(self, wanted: str, model: str) -> tuple[Speller, str] | None:
        for file in (*self._named, *_places(model)):
            facts = _read(file)
            if facts is not None and hash_of(facts) == wanted:
                return _speller(facts), " " if facts.get("model", {}).get("type") == "WordLevel" else ""
        return None


def hash_of(facts: dict[str, Any]) -> str:
    """The hash under which a trace names this tokenizer: see ``monologue.backends.tokens``."""
    facts = {name: value for name, value in facts.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _places(model: str) -> Iterator[Path]:
    if not model or "\0" in model:
        return
    yield Path(model) / "tokenizer.json"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub")
    if model.count("/") == 1 and ".." not in model:
        yield from sorted((cache / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/tokenizer.json"))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_FILE:
            return None
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _speller(facts: dict[str, Any]) -> Speller:
    if facts.get("type") == "bytes":
        return _byte_speller(facts["specials"])
    vocabulary = _vocabulary(facts)
    special = {one["id"] for one in facts.get("added_tokens", ())}
    letters = _letters() if "ByteLevel" in json.dumps([facts.get("decoder"), facts.get("pre_tokenizer")]) else None

    def spell(one: int) -> str:
        text = vocabulary.get(one)
        if text is None:
            return f"<{one}>"
        if one in special:
            return text
        if letters is not None:
            return _text(bytes(letters[c] for c in text)) if all(c in letters for c in text) else text
        return text.replace("▁", " ")

    return spell


def _vocabulary(facts: dict[str, Any]) -> dict[int, str]:
    listed = facts.get("model", {}).get("vocab", {})
    if isinstance(listed, dict):
        found = {number: text for text, number in listed.items()}
    else:  # Unigram: a list of pairs of text and score
        found = {number: pair[0] for number, pair in enumerate(listed)}
    found.update({one["id"]: one["content"] for one in facts.get("added_tokens", ())})
    return found


def _letters() -> dict[str, int]:
    """The byte behind each letter of byte-level BPE, as GPT-2 laid them out."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _text(raw: bytes) -> str:
    """A token may end within a character; what is no UTF-8 by itself is shown as bytes."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in raw)


def _byte_speller(specials: Sequence[str]) -> Speller:
    base = len(specials)

    def spell(one: int) -> str:
        if 0 <= one < base:
            return specials[one]
        return _text(bytes([one - base])) if base <= one < base + 256 else f"<{one}>"

    return spell
