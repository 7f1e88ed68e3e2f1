"""The page on this machine: a small server on the loopback interface whose address holds a random token.

Other programs and other web pages of this machine must not read a run or write into it, so every request needs the token in its path and a
Host header that names the loopback (a web page that rebinds its own name to 127.0.0.1 still sends its own name). Pictures are found by hash
alone, so no path can lead out of the run. What the browser may load is said by a strict Content-Security-Policy: nothing but these answers.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from monologue.traces.page.detail import curves, detail, encoded, picture
from monologue.traces.page.index import Index
from monologue.traces.page.pieces import Pieces
from monologue.traces.schema import Annotation
from monologue.traces.store import Appender, RunError

SCRIPTS = ("htm-preact.js", "data.js", "text.js", "tokens.js", "list.js", "episode.js", "graph.js", "app.js")
"""In the order in which they need each other."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LARGEST_POST = 64 * 1024
LONGEST_REMARK = 4000
AT_ONCE = 8 * 2**20
"""Bytes of the run that are read before waiting requests get their turn."""
_PICTURE = re.compile(r"image/([0-9a-f]{64})\.png")


class BadRequest(Exception):
    """A request that does not say what it should."""


def static(name: str) -> str:
    """A file of the page itself."""
    return (files("monologue.traces.page") / "static" / name).read_text(encoding="utf-8")


@cache
def scripts() -> str:
    """All scripts as one, so that a browser asks once."""
    return '"use strict";\n' + "\n".join(static(name) for name in SCRIPTS)


def embedded(value: Any) -> str:
    """JSON for a script element: no text can end the element, begin a comment, or break a line of JavaScript."""
    return encoded(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Desk:
    """What the server does, apart from HTTP."""

    def __init__(self, run: str | Path, tokenizers: tuple[Path, ...] = ()) -> None:
        """Raises RunError where the folder is no run of this schema."""
        self.index = Index(run)
        self.path = self.index.path
        self.pieces = Pieces(self.path, tokenizers)
        self.stopping = threading.Event()
        self._notes: Appender | None = None
        self._lock = threading.Lock()
        self._reading = True

    def follow(self) -> None:
        """Keeps the index up to date until ``stopping``."""
        while not self.stopping.is_set():
            try:
                self._reading = self.index.refresh(AT_ONCE)
            except OSError as error:
                self._reading = False
                self.index.report(f"the run cannot be read on: {error.strerror}")
            self.stopping.wait(0.001 if self._reading else 0.3)

    def listing(self, after: int) -> dict[str, Any]:
        """Rows that changed after a revision; ``same`` where nothing did."""
        if after == self.index.revision and not self._reading:
            return {"revision": after, "rows": [], "reading": False, "same": True}
        return {**self.index.changes(after), "reading": self._reading}

    def episode(self, episode_id: str) -> dict[str, Any] | None:
        """An episode's detail; None where the run has none of that id."""
        row = self.index.row(episode_id)
        with self._lock:
            return None if row is None else detail(row, self.pieces)

    def annotate(self, wish: Any) -> dict[str, Any]:
        """Writes what a person says about an episode or a step of it. Raises BadRequest, RunError."""
        note = _annotation(wish)
        row = self.index.row(note.episode_id)
        if row is None:
            raise BadRequest("the run has no episode of that id")
        spans = {span["id"] for span in detail(row, self.pieces)["spans"]}
        if note.span_id is not None and note.span_id not in spans:
            raise BadRequest("the episode has no step of that id")
        with self._lock:
            if self._notes is None:
                (self.path / "annotations").mkdir(exist_ok=True)
                self._notes = Appender(self.path / "annotations" / f"page-{os.getpid()}-{secrets.token_hex(4)}.jsonl")
            self._notes.append(note.model_dump_json().encode() + b"\n")
        self.index.refresh()
        return note.model_dump()

    def close(self) -> None:
        self.stopping.set()
        if self._notes is not None:
            self._notes.close()


def _annotation(wish: Any) -> Annotation:
    if not isinstance(wish, Mapping) or not set(wish) <= {"episode_id", "span_id", "score", "remark"}:
        raise BadRequest("expected an object with episode_id, span_id, score, remark")
    episode, span, score, remark = (wish.get(name) for name in ("episode_id", "span_id", "score", "remark"))
    if not isinstance(episode, str) or not (span is None or isinstance(span, str)):
        raise BadRequest("expected ids as text")
    if score is not None and (not isinstance(score, (int, float)) or isinstance(score, bool) or not math.isfinite(score)):
        raise BadRequest("expected the score as a number")
    if remark is not None and (not isinstance(remark, str) or len(remark) > LONGEST_REMARK):
        raise BadRequest(f"expected the remark as text of {LONGEST_REMARK} characters at most")
    if score is None and not (remark or "").strip():
        raise BadRequest("give a score, a remark or both")
    return Annotation(
        episode_id=episode,
        span_id=span,
        name="remark" if score is None else "score",
        value=None if score is None else float(score),
        text=(remark or "").strip() or None,
        weight=0.0,
        scope="episode" if span is None else "turn",
        role=None,
        source="person:page",
        created_ns=time.time_ns(),
    )


class PageServer(ThreadingHTTPServer):
    """Serves one run until ``shutdown``."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, desk: Desk, port: int = 0) -> None:
        """``port`` 0 takes a free one. Raises OSError where the port is taken."""
        super().__init__(("127.0.0.1", port), Handler)
        self.desk = desk
        self.token = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; anything else is ours and shows its traceback."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def run(self) -> None:
        """Serves until interrupted."""
        follower = threading.Thread(target=self.desk.follow, daemon=True)
        follower.start()
        try:
            self.serve_forever(poll_interval=0.2)
        finally:
            self.desk.close()
            follower.join(5)
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "monologue"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the token stands in every path."""

    def _answer(self, act: Callable[[str, Mapping[str, str]], None]) -> None:
        asked = urlsplit(self.path)
        token, _, rest = asked.path.lstrip("/").partition("/")
        if not self._is_loopback():
            self._say(HTTPStatus.FORBIDDEN, "this server answers on the loopback interface only")
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._say(HTTPStatus.FORBIDDEN, "open the address that 'monologue view' has printed, with its token")
        else:
            try:
                act(rest, {name: found[0] for name, found in parse_qs(asked.query).items()})
            except BadRequest as error:
                self._say(HTTPStatus.BAD_REQUEST, str(error))
            except RunError as error:
                self._say(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _is_loopback(self) -> bool:
        port = self.server.server_address[1]
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in hosts and (origin is None or origin in {f"http://{host}" for host in hosts})

    def _get(self, path: str, query: Mapping[str, str]) -> None:
        desk = self.server.desk
        if path == "":
            self._send(document(desk).encode(), "text/html; charset=utf-8")
        elif path == "page.css":
            self._send(static("app.css").encode(), "text/css; charset=utf-8")
        elif path == "page.js":
            self._send(scripts().encode(), "text/javascript; charset=utf-8")
        elif path == "api/index":
            self._json(desk.listing(_whole(query.get("after", "0"))))
        elif path == "api/search":
            self._json(desk.index.search(query.get("q", "")))
        elif path == "api/curves":
            self._json(curves(desk.path))
        elif path == "api/episode":
            self._json(desk.episode(query.get("id", "")))
        elif found := _PICTURE.fullmatch(path):
            self._picture(found[1])
        else:
            self._say(HTTPStatus.NOT_FOUND, "no such thing here")

    def _picture(self, sha256: str) -> None:
        data = picture(self.server.desk.path, sha256)
        if data is None:
            self._say(HTTPStatus.NOT_FOUND, "the run lacks this picture")
        else:
            self._send(data, "image/png", "private, max-age=86400, immutable")

    def _post(self, path: str, query: Mapping[str, str]) -> None:
        if path != "api/annotate":
            self._say(HTTPStatus.NOT_FOUND, "no such thing here")
            return
        length = _whole(self.headers.get("Content-Length", ""))
        if self.headers.get_content_type() != "application/json" or not 0 < length <= LARGEST_POST:
            self.close_connection = True
            raise BadRequest(f"expected JSON of {LARGEST_POST} bytes at most")
        try:
            wish = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise BadRequest("expected JSON") from error
        self._json(self.server.desk.annotate(wish))

    def _json(self, value: Any) -> None:
        if value is None:
            self._say(HTTPStatus.NOT_FOUND, "the run has no episode of that id")
        else:
            self._send(encoded(value).encode(), "application/json")

    def _say(self, status: HTTPStatus, words: str) -> None:
        self._send(words.encode(), "text/plain; charset=utf-8", status=status)

    def _send(self, body: bytes, kind: str, cache: str = "no-store", status: HTTPStatus = HTTPStatus.OK) -> None:
        if status >= 400 and self.command == "POST":
            self.close_connection = True
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", cache),
            ("Content-Security-Policy", POLICY),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def document(desk: Desk) -> str:
    """index.html of a served run."""
    boot = {"served": True, "name": desk.path.resolve().name, "info": desk.index.info}
    return (
        static("index.html")
        .replace("{{HEAD}}", '<link rel="stylesheet" href="page.css">')
        .replace("{{SCRIPTS}}", '<script src="page.js"></script>')
        .replace("{{BOOT}}", embedded(boot))
    )


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise BadRequest("expected a whole number")
    return int(text)
