"""The page without a browser: who may ask the server, what it answers, what lands in the run, what the one file holds."""

import base64
import gzip
import hashlib
import http.client
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monologue.backends.tokens import ByteTokenizer, tokenizer_hash
from monologue.cli import main
from monologue.traces.page.detail import curves, detail, thinned
from monologue.traces.page.export import export
from monologue.traces.page.index import FIELDS, Index, reward_of, steps_of
from monologue.traces.page.pieces import BYTES, Pieces, hash_of
from monologue.traces.page.serve import SCRIPTS, Desk, PageServer, embedded, static
from monologue.traces.recorder import Recorder
from monologue.traces.schema import calls_of
from monologue.traces.store import RunError, RunReader, RunWriter
from monologue.traces.verify import verify
from tests import page_runs as runs

ROOT = Path(__file__).parent.parent


class Client:
    """One served run and a caller that may lie about itself."""

    def __init__(self, run: Path) -> None:
        self.desk = Desk(run)
        self.server = PageServer(self.desk)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while self.desk.index.refresh():
            pass

    def ask(self, path: str, token: str | None = None, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        link.request(method, f"/{self.server.token if token is None else token}/{path}", body, headers)
        answer = link.getresponse()
        found = answer.status, answer.read()
        self.headers = dict(answer.getheaders())
        link.close()
        return found

    def get(self, path: str) -> Any:
        status, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)

    def annotate(self, **wish: Any) -> tuple[int, bytes]:
        return self.ask("api/annotate", method="POST", body=wish)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path / "run", runs.mixed(tmp_path / "run")


@pytest.fixture
def client(run: tuple[Path, dict[str, Any]]) -> Iterator[Client]:
    client = Client(run[0])
    yield client
    client.server.shutdown()
    client.thread.join(10)


def as_rows(listing: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(("number", *FIELDS), values, strict=True)) for values in listing["rows"]]


def test_nothing_is_answered_without_the_token(client: Client) -> None:
    for token in ("", "x", client.server.token[:-1], client.server.token + "x", "%c3%bc"):
        for path in ("", "page.js", "api/index?after=0"):
            status, body = client.ask(path, token=token)
            assert status == 403 and b"monologue view" in body
    status, _ = client.ask("api/annotate", token="x", method="POST", body={"episode_id": "x"})
    assert status == 403
    assert len(client.server.token) >= 32 and client.server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_header_is_refused(client: Client, host: str) -> None:
    assert client.ask("api/index?after=0", Host=host)[0] == 403
    assert client.ask("api/index?after=0", Host=f"localhost:{client.port}")[0] == 200


def test_a_foreign_origin_is_refused(client: Client, run: tuple[Path, dict[str, Any]]) -> None:
    wish = {"episode_id": run[1]["rich"], "remark": "x"}
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{client.port}"):
        assert client.ask("api/annotate", method="POST", body=wish, Origin=origin)[0] == 403
    assert client.ask("api/annotate", method="POST", body=wish, Origin=f"http://127.0.0.1:{client.port}")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("../run.json", "image/../run.json", "image/..%2frun.json", "image/%2e%2e/run.json", "//etc/passwd", "image//etc/passwd"),
        *("static/../serve.py", "serve.py", "image/" + "a" * 64 + ".png", "image/" + "A" * 64 + ".png", "image/" + "a" * 63 + ".png"),
        *("page.js%00", "app.js", "run.json", "spans", "htm-preact.LICENSE"),
    ],
)
def test_no_path_leads_anywhere_else(client: Client, path: str) -> None:
    assert client.ask(path)[0] == 404


def test_everything_is_served_with_a_strict_policy(client: Client, run: tuple[Path, dict[str, Any]]) -> None:
    for path in ("", "page.js", "page.css", "api/index?after=0", "api/curves"):
        assert client.ask(path)[0] == 200
        policy = client.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert client.headers["X-Content-Type-Options"] == "nosniff" and client.headers["Referrer-Policy"] == "no-referrer"
    (picture,) = (run[0] / "images").glob("*.png")
    assert client.ask(f"image/{picture.name}") == (200, picture.read_bytes())


def test_the_listing_says_how_each_episode_went(client: Client, run: tuple[Path, dict[str, Any]]) -> None:
    listing = client.get("api/index?after=0")
    rows = {row["id"]: row for row in as_rows(listing)}
    ids = run[1]
    rich = rows[ids["rich"]]
    assert (rich["reward"], rich["turns"], rich["faults"], rich["failures"], rich["status"]) == (1.0 - 0.125, 4, 1, 0, "ok")
    assert rich["roles"] == ["questioner", "answerer"] and rich["gold"] == rich["answer"] == "red" and rich["tokens"] == 6 + 3 + 6
    assert [rows[one]["reward"] for one in ids["group"]] == [1.0, 0.0, 0.0] and rows[ids["group"][2]]["answer"] is None
    assert rows[ids["failed"]]["status"] == "failed" and "fell over" in rows[ids["failed"]]["error"]
    assert rows[ids["failed"]]["reward"] is None and rows[ids["failed"]]["failures"] == 1
    assert len(rows[ids["hostile"]]["question"]) <= 301
    again = client.get(f"api/index?after={listing['revision']}")
    assert again["rows"] == [] and again["revision"] == listing["revision"]


def test_an_episode_shows_what_the_trace_holds(client: Client, run: tuple[Path, dict[str, Any]]) -> None:
    shown = client.get(f"api/episode?id={run[1]['rich']}")
    (episode,) = [one for one in RunReader(run[0]).episodes() if one.start.episode_id == run[1]["rich"]]
    for call, span in zip(calls_of(episode.spans), [one for one in shown["spans"] if one["kind"] == "policy"], strict=True):
        assert tuple(span["tokens"]["ids"]) == call.sampled_ids
        assert tuple(span["tokens"]["values"]["logprob"]) == call.sampled_logprobs
        assert "".join(span["tokens"]["text"]) == call.output
    first, _, tool, last = shown["spans"]
    assert first["tokens"]["values"]["entropy"] == [0.5, 1, 2, 0, 0.25, 3]
    assert tuple(first["tokens"]["values"]["advantage"]) == runs.ADVANTAGES
    assert last["tokens"]["values"] == {"logprob": [-0.5] * 6, "entropy": None, "advantage": None} and last["fault"] and last["truncated"]
    assert tool["tool"] == "calculator" and tool["result"] == "forty-two" and json.loads(tool["arguments"]) == {"expression": "6*7"}
    assert first["action"]["region"] == [0.25, 0.25, 0.75, 0.5] and len(shown["spans"][1]["attention"][0]) == 6
    moves = [
        ("start", "", "ask"),
        ("ask", "look", "answer"),
        ("answer", "reply", "tools"),
        ("tools", "", "ask"),
        ("ask", "conclude", "end"),
    ]
    assert [tuple(move) for move in shown["path"]] == moves
    assert client.ask("api/episode?id=nobody")[0] == 404


def test_the_text_filter_looks_into_every_output(client: Client) -> None:
    numbers = client.get("api/search?q=FORTY-two")
    assert numbers == [0] and client.get("api/search?q=said%202") == [2, 3, 4] and client.get("api/search?q=nothing%20of%20this") == []


def test_an_annotation_lands_in_the_log_and_comes_back(client: Client, run: tuple[Path, dict[str, Any]]) -> None:
    key = run[1]["rich"]
    before = client.get("api/index?after=0")["revision"]
    span = client.get(f"api/episode?id={key}")["spans"][1]["id"]
    assert client.annotate(episode_id=key, span_id=span, score=-2.5, remark=" wrong \u202e place ")[0] == 200
    assert client.annotate(episode_id=key, remark="<script>window.pwned=9</script>")[0] == 200
    (episode,) = [one for one in RunReader(run[0]).episodes() if one.start.episode_id == key]
    by_person = [note for note in episode.annotations if note.source == "person:page"]
    assert [(n.span_id, n.name, n.value, n.scope, n.weight) for n in by_person] == [
        (span, "score", -2.5, "turn", 0.0),
        (None, "remark", None, "episode", 0.0),
    ]
    assert by_person[0].text == "wrong \u202e place"
    (row,) = as_rows(client.get(f"api/index?after={before}"))
    assert row["id"] == key and row["notes"] == 2 and row["reward"] == 0.875, "what a person says never changes a reward"
    assert [note["text"] for note in client.get(f"api/episode?id={key}")["notes"]][-1] == "<script>window.pwned=9</script>"
    assert len(list((run[0] / "spans").glob("*.jsonl"))) == 1, "the page opens no span file"


def test_bad_annotations_are_refused_in_one_sentence_and_write_nothing(client: Client, run: tuple[Path, dict[str, Any]]) -> None:
    key = run[1]["rich"]
    for wish in (
        {"episode_id": "nobody", "remark": "x"},
        {"episode_id": key, "span_id": "nobody", "remark": "x"},
        {"episode_id": key},
        {"episode_id": key, "remark": "  "},
        {"episode_id": key, "remark": "x" * 5000},
        {"episode_id": key, "score": "1"},
        {"episode_id": key, "score": True},
        {"episode_id": key, "score": 1, "weight": 5},
        {"episode_id": 5, "remark": "x"},
        {"remark": "x"},
    ):
        status, body = client.annotate(**wish)
        assert status == 400 and 0 < len(body) < 200, (wish, body)
    for body, kind in (
        (b"{", "application/json"),
        (b'{"score": NaN}', "application/json"),
        (b"[]", "application/json"),
        (b"a=1", "text/plain"),
    ):
        assert client.ask("api/annotate", method="POST", body=body, **{"Content-Type": kind})[0] == 400
    assert client.ask("api/annotate", method="POST", body={"episode_id": key, "remark": "y" * 70_000})[0] == 400
    assert client.ask("api/index?after=-1")[0] == client.ask("api/index?after=x")[0] == 400
    assert not list((run[0] / "annotations").glob("page-*"))


def test_a_growing_run_is_followed(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    recorder = Recorder(writer)
    runs.plain(recorder, 0)
    index = Index(tmp_path / "run")
    assert index.refresh() and not index.refresh() and len(index.rows) == 1
    episode = runs.begun(recorder, 1)
    episode.__enter__()
    assert index.refresh() and index.rows[1].values()[FIELDS.index("status")] == "unfinished" and index.changes()["open"] == 1
    (file,) = (tmp_path / "run" / "spans").glob("*.jsonl")
    with file.open("ab") as torn:
        torn.write(b'{"record":"span","epi')
    index.refresh()
    assert index.changes()["torn"] == 1 and not index.damage
    file.write_bytes(file.read_bytes()[:-21])
    episode.finish("blue")
    episode.__exit__(None, None, None)
    revision = index.revision
    assert index.refresh() and [row[0] for row in index.changes(revision)["rows"]] == [1] and index.changes()["open"] == 0
    assert index.changes()["torn"] == 0


def test_an_annotation_that_is_read_before_its_episode_is_not_lost(tmp_path: Path) -> None:
    recorder = Recorder(RunWriter(tmp_path / "run"))
    runs.plain(recorder, 0)
    spans = tmp_path / "run" / "spans"
    spans.rename(tmp_path / "later")
    index = Index(tmp_path / "run")
    index.refresh()
    (tmp_path / "later").rename(spans)
    index.refresh()
    assert index.rows[0].values()[FIELDS.index("reward")] == 1.0


def test_ten_thousand_episodes_are_listed_in_steps(tmp_path: Path) -> None:
    runs.many(tmp_path / "run", 10_000)
    index = Index(tmp_path / "run")
    index.refresh(100_000)
    assert 0 < len(index.rows) < 1000, "a first answer does not wait for the whole run"
    while index.refresh(2**20):
        pass
    listing = index.changes()
    assert len(listing["rows"]) == 10_000 and len(json.dumps(listing)) < 4_000_000
    assert listing["graphs"]["monologue"][0][-1] == 10_000 and not listing["damage"]
    assert detail(index.rows[9_999], Pieces(index.path))["spans"][0]["output"] == "yes"


def test_damaged_lines_are_counted_and_named_and_the_rest_is_shown(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    (file,) = (run[0] / "spans").glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    junk = (
        b"no json\n",
        b"[]\n",
        b'{"record":"span","episode_id":"nobody"}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        lines[0].replace(b'"attempt":0', b'"attempt":"x"'),
    )
    file.write_bytes(b"".join([*junk, *lines, lines[0]]))
    index = Index(run[0])
    index.refresh()
    assert (
        len(index.rows) == 6 and len(index.damage) == len(junk) + 1 and "begins twice" in index.damage[-1] and file.name in index.damage[0]
    )
    file.write_bytes(b"".join([*junk, *lines]).replace(b'"status":"ok"', b'"status":"xx"'))
    with pytest.raises(RunError, match="not a record"):
        detail(index.rows[0], Pieces(run[0]))


def test_lines_of_another_hand_are_read_too(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    """Other spacing and order of keys than ours: the short cut must not be the only way."""
    index, other = Index(run[0]), tmp_path / "other"
    index.refresh()
    shutil.copytree(run[0], other)
    (file,) = (other / "spans").glob("*.jsonl")
    turned = [json.dumps(dict(reversed(json.loads(line).items()))) for line in file.read_text().splitlines()]
    file.write_text("\n".join(turned) + "\n")
    foreign = Index(other)
    foreign.refresh()
    assert [row.values() for row in foreign.rows] == [row.values() for row in index.rows] and foreign.edges() == index.edges()


def test_rewards_add_up_and_a_second_scoring_replaces_the_first() -> None:
    def note(value: float | None, name: str = "r", weight: float = 1.0, scope: str = "episode", span: str | None = None) -> dict[str, Any]:
        return {"name": name, "value": value, "weight": weight, "scope": scope, "span_id": span, "source": "s", "role": None}

    assert reward_of([]) is None and reward_of([note(None), note(3.0, weight=0.0)]) is None
    assert reward_of([note(0.0)]) == 0.0
    assert reward_of([note(1.0), note(0.5), note(2.0, "b", 0.25), note(9.0, "advantage"), note(9.0, scope="token")]) == 1.0
    assert reward_of([note(1.0, span="x", scope="turn"), note(1.0, span="y", scope="turn")]) == 2.0
    assert reward_of([note(float("nan"))]) is None


def test_the_path_goes_in_order_of_beginning() -> None:
    assert steps_of([(1, "b", None), (0, "a", "x")]) == [("start", "", "a"), ("a", "x", "b"), ("b", "", "end")]


def test_tokens_are_named_only_by_the_tokenizer_that_made_them(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    assert hash_of(BYTES) == tokenizer_hash(ByteTokenizer())
    file = tmp_path / "own.json"
    bpe = {"model": {"type": "BPE", "vocab": {"\u0120hi": 0, "\u00c3": 1, "<eos>": 2}}, "decoder": {"type": "ByteLevel"}}
    facts = {**bpe, "added_tokens": [{"id": 2, "content": "<eos>"}], "padding": {"any": 1}, "truncation": None}
    file.write_text(json.dumps(facts))
    assert Pieces(run[0]).of([0], hash_of(facts), "m") is None
    named = Pieces(run[0], (file,))
    assert named.of([0, 1, 2, 9], hash_of(facts), "m") == [" hi", "<C3>", "<eos>", "<9>"]
    assert named.of([0], "0" * 64, str(tmp_path)) is None
    (run[0] / "tokenizers").mkdir()
    unigram = {"model": {"type": "Unigram", "vocab": [["\u2581a", -1.0], ["b", -2.0]]}}
    (run[0] / "tokenizers" / "x.json").write_text(json.dumps(unigram))
    assert Pieces(run[0]).of([0, 1], hash_of(unigram), "m") == [" a", "b"]


def test_curves_are_read_thinned_and_bad_lines_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"stage": "grpo", "step": step, "loss": 1.0, "flag": True, "bad": float("nan")}) for step in range(2000)]
    (tmp_path / "curve.jsonl").write_text("\n".join([*lines, "junk", "[]", ""]))
    (curve,) = curves(tmp_path)
    assert (curve["stage"], curve["name"]) == ("grpo", "loss") and len(curve["points"]) <= 501 and curve["points"][-1] == (1999, 1.0)
    assert thinned([]) == [] and thinned([(1, 2)]) == [(1, 2)]


def parts(page: str) -> dict[str, str]:
    return dict(re.findall(r'<script type="(?:application/json|text/plain)" id="([^"]+)">(.*?)</script>', page, flags=re.DOTALL))


def test_the_one_file_holds_the_whole_run_and_fetches_nothing(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    assert export(run[0], tmp_path / "page.html") == 6
    page = (tmp_path / "page.html").read_text()
    found = parts(page)
    episodes = json.loads(gzip.decompress(base64.b64decode(found["episodes-0"])))
    assert [one["start"]["episode_id"] for one in episodes] == [row[1] for row in json.loads(found["index"])["rows"]]
    (picture,) = (run[0] / "images").glob("*.png")
    assert base64.b64decode(found[f"picture-{picture.stem}"]) == picture.read_bytes()
    assert not re.search(r"""(?:src|href|url|action)\s*[=(]\s*["']?(?:https?:)?//""", page), "the page loads nothing from anywhere"
    assert "@import" not in page and "default-src 'none'" in page and "connect-src" not in page
    policy = re.search(r'content="(default-src[^"]*)"', page)
    assert policy
    for script in re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]


def test_a_link_in_place_of_a_picture_leads_nowhere(client: Client, tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    """A run from a stranger must not make us publish our own files."""
    (stored,) = (run[0] / "images").glob("*.png")
    secret = tmp_path / "secret.png"
    secret.write_bytes(stored.read_bytes())
    for swap in (lambda: stored.symlink_to(secret), lambda: stored.write_text("a secret"), lambda: stored.mkdir()):
        stored.unlink()
        swap()
        assert client.ask(f"image/{stored.name}")[0] == 404
        export(run[0], tmp_path / "page.html")
        assert f"picture-{stored.stem}" not in parts((tmp_path / "page.html").read_text())


def test_hostile_text_cannot_leave_its_place_in_the_file(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    export(run[0], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "window.pwned=1</script>" not in page and "<img src=x" not in page and "<!--<script>" not in page
    assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script>", page)) == 1 + len(parts(page))
    assert runs.HOSTILE[0] in json.loads(parts(page)["index"])["rows"][1][9]
    text = "</script><!-- & \u2028\u202e\U0001f600"
    assert not re.search(r"[<>&\u2028\u202e]", embedded(text)) and json.loads(embedded(text)) == text
    assert embedded([float("nan"), -float("inf")]) == '["nan","-inf"]'


def test_our_scripts_build_no_html_from_text() -> None:
    for name in SCRIPTS[1:]:
        text = static(name)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|dangerously|srcdoc", text), name
        assert "</script" not in text and "{{" not in text.replace("${{", ""), name


def test_the_vendored_library_is_the_one_its_readme_names() -> None:
    folder = ROOT / "traces" / "page" / "static"
    digest = hashlib.sha256((folder / "htm-preact.js").read_bytes()).hexdigest()
    assert f"{digest}  htm-preact.js" in (folder / "README.md").read_text() and (folder / "htm-preact.LICENSE").is_file()


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    assert main(["view", str(run[0]), "--html", str(tmp_path / "p.html")]) == 0 and "6 episodes" in capsys.readouterr().out
    assert main(["view", str(run[0]), "--list"]) == 0 and run[1]["rich"][:12] in capsys.readouterr().out
    for words, reason in (
        ([str(tmp_path)], "run.json"),
        ([str(run[0]), "--html", str(tmp_path / "no" / "p.html")], "cannot write"),
        ([str(run[0]), "--html", "/proc/p.html"], "cannot write"),
        ([str(run[0]), "--tokenizer", "nothing.json", "--html", str(tmp_path / "q.html")], "tokenizer.json"),
        ([str(run[0]), "--svg", "x.svg"], "--episode"),
        ([str(run[0]), "--html", "x.html", "--episode", "a"], "whole run"),
    ):
        assert main(["view", *words]) == 2
        told = capsys.readouterr().err
        assert reason in told and told.count("\n") == 1, told
    with pytest.raises(SystemExit):
        main(["view", str(run[0]), "--port", "99999"])
    server = PageServer(Desk(run[0]))
    assert main(["view", str(run[0]), "--no-browser", "--port", str(server.server_address[1])]) == 2
    assert "cannot serve on port" in capsys.readouterr().err
    server.server_close()


def test_a_run_of_the_page_stays_verifiable(client: Client, run: tuple[Path, dict[str, Any]]) -> None:
    before = [(check.name, check.ok) for check in verify(run[0])]
    assert client.annotate(episode_id=run[1]["group"][0], score=1)[0] == 200
    assert [(check.name, check.ok) for check in verify(run[0])] == before
