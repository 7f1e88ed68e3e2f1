"""A run as one HTML file that opens without network, server or this program.

The listing comes first and the program right after it, so the first rows show while the browser still reads the rest: episodes in
compressed parts that are unpacked when one of them is opened, and each picture once. Everything is base64 or escaped JSON in elements that
the browser never runs, and the page's own policy forbids it to load or run anything that is not in the file by hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monologue.traces.page.detail import curves, detail, encoded, picture
from monologue.traces.page.index import Index
from monologue.traces.page.pieces import Pieces
from monologue.traces.page.serve import embedded, scripts, static
from monologue.traces.store import RunError

CHUNK = 100
"""Episodes in one compressed part."""


def export(run: str | Path, file: Path, tokenizers: tuple[Path, ...] = ()) -> int:
    """Writes the page and returns how many episodes it holds. Raises RunError where the run does not read or the file cannot be written."""
    index = Index(run)
    index.refresh()
    pieces = Pieces(index.path, tokenizers)
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("w", encoding="utf-8") as page:
            page.writelines(_document(index, pieces))
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write {str(file)!r}: {error.strerror}; name a file in a folder that you may write to") from error
    return len(index.rows)


def _document(index: Index, pieces: Pieces) -> Iterator[str]:
    head, rest = static("index.html").split("{{HEAD}}")
    before, rest = rest.split("{{BOOT}}")
    between, after = rest.split("{{SCRIPTS}}")
    style, script = static("app.css"), scripts()
    boot = {"served": False, "name": index.path.resolve().name, "info": index.info, "chunk": CHUNK}
    yield head + _policy(style, script) + f"<style>{style}</style>" + before + embedded(boot) + between
    yield _data("index", "application/json", embedded(index.changes()))
    yield _data("curves", "application/json", embedded(curves(index.path)))
    yield f"<script>{script}</script>\n"
    yield from _parts(index, pieces)
    yield after


def _policy(style: str, script: str) -> str:
    rules = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(name: str, kind: str, text: str) -> str:
    return f'<script type="{kind}" id="{name}">{text}</script>\n'


def _parts(index: Index, pieces: Pieces) -> Iterator[str]:
    written: set[str] = set()
    for place in range(0, len(index.rows), CHUNK):
        episodes = [_detail(row, pieces) for row in index.rows[place : place + CHUNK]]
        yield _data(f"episodes-{place // CHUNK}", "text/plain", _packed(episodes))
        for sha256 in dict.fromkeys(image["sha256"] for episode in episodes for span in episode["spans"] for image in span["images"]):
            data = None if sha256 in written else picture(index.path, str(sha256))
            if data is not None:
                written.add(sha256)
                yield _data(f"picture-{sha256}", "text/plain", base64.b64encode(data).decode())
    yield _data("texts", "text/plain", _packed(["\n".join(row.texts) for row in index.rows]))


def _detail(row: Any, pieces: Pieces) -> dict[str, Any]:
    """The episode; one that does not read is shown with what the listing knows, as the server does."""
    try:
        return detail(row, pieces)
    except RunError as error:
        return {"fault": str(error), "spans": []}


def _packed(value: Any) -> str:
    return base64.b64encode(gzip.compress(encoded(value).encode(), 5, mtime=0)).decode()
