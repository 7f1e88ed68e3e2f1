"""The command line as a person meets it: every good path once, and for every bad input one clear sentence and the right exit code."""

import base64
import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from monologue.cli import main
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunReader

ROOT = Path(__file__).parent.parent


def say(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of one command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as leave:  # argparse
        code = int(leave.code or 0)
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence with which a command is refused."""
    code, _, told = say(capsys, *words)
    lines = [line for line in told.splitlines() if line.strip()]
    assert code == 2 and "Traceback" not in told, told
    assert len(lines) == 1 or lines[0].startswith("usage:"), told
    return lines[-1]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "own.png"
    Shapes().problem("test", 0).pictures[0]().resize((300, 200)).save(file)
    return file


def test_the_page_of_a_shipped_policy_shows_its_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Runs name shipped policies by names that travel, ``starter:answerer``, which are no folders."""
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert say(capsys, "play", "--task", "hops", "--n", 1, "--out", run)[0] == 0
    assert say(capsys, "view", run, "--html", page)[0] == 0
    packed = re.search(r'id="episodes-0">([^<]+)<', page.read_text())
    assert packed is not None
    (episode,) = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    assert episode["spans"][0]["tokens"]["text"][:3] == ["<look>", "what", "follows"]


def test_play_verify_view(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, told, _ = say(capsys, "play", "--n", 4, "--out", run)
    assert code == 0 and "accuracy" in told and "4 episodes ended well" in told
    code, told, _ = say(capsys, "verify", run, "--json", tmp_path / "checks.json")
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert code == 0 and checks and all(check["ok"] and {"name", "figure", "span"} <= set(check) for check in checks)
    code, told, _ = say(capsys, "view", run, "--list")
    episodes = [episode.start.episode_id for episode in RunReader(run).episodes()]
    assert code == 0 and all(episode[:12] in told for episode in episodes)
    code, told, _ = say(capsys, "view", run, "--episode", episodes[2], "--svg", tmp_path / "e.svg")
    assert code == 0 and "questioner" in told and "gold" in told
    assert "<svg" in (tmp_path / "e.svg").read_text() and "@font-face" not in (tmp_path / "e.svg").read_text()
    assert "begin with" in refused(capsys, "view", run, "--episode", "zzz")


def test_play_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    say(capsys, "play", "--n", 3, "--out", tmp_path / "run")
    code, told, _ = say(capsys, "play", "--n", 5, "--out", tmp_path / "run")
    assert code == 0 and "3 of them from before" in told
    assert sorted(e.start.problem_id for e in RunReader(tmp_path / "run").episodes()) == [f"shapes/test/0/{i}" for i in range(5)]
    assert "begun with" in refused(capsys, "play", "--n", 5, "--seed", 1, "--out", tmp_path / "run")
    assert "exists" in refused(capsys, "play", "--n", 5, "--no-resume", "--out", tmp_path / "run")


def test_eval_writes_what_scripts_rely_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, told, _ = say(capsys, "eval", "--graph", "blind,direct,monologue", "--n", 20, "--json", tmp_path / "e.json")
    rows = json.loads((tmp_path / "e.json").read_text())
    assert code == 0 and [row["graph"] for row in rows] == ["blind", "direct", "monologue"] and "multi-hop" in told
    wanted = {"graph", "task", "n", "accuracy", "stderr", "chance", "by_family", "turns", "tokens", "seconds"}
    assert all(wanted <= set(row) and row["n"] == 20 for row in rows)


@pytest.mark.parametrize("control", ["shuffle-answers", "wrong-picture"])
def test_controls_are_played_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path, control: str) -> None:
    code, _, _ = say(capsys, "eval", "--graph", "monologue", "--n", 20, "--control", control, "--json", tmp_path / "e.json")
    assert code == 0 and json.loads((tmp_path / "e.json").read_text())[0]["control"] == control


def test_an_own_picture_is_played(capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: Path) -> None:
    asks = ("--question", "What colour is the star?", "--choices", "red", "blue", "green")
    code, told, _ = say(capsys, "play", "--image", picture, *asks, "--out", tmp_path / "run")
    assert code == 0 and "answer:" in told
    (episode,) = RunReader(tmp_path / "run").episodes()
    assert episode.start.gold is None and episode.start.question == "What colour is the star?"


@pytest.mark.parametrize("graph", ["monologue", "direct", "look", "blind", "monologue:looks=2"])
def test_the_scripted_backend_plays_the_problems_own_program(capsys: pytest.CaptureFixture[str], tmp_path: Path, graph: str) -> None:
    families = ("--families", "near,compare") if "looks" in graph else ()
    words = ("--backend", "scripted", "--graph", graph, "--n", 10, *families)
    code, told, _ = say(capsys, "play", *words, "--out", tmp_path / "run")
    assert code == 0 and "accuracy 1.000" in told
    assert say(capsys, "verify", tmp_path / "run")[0] == 0
    assert "takes no" in refused(
        capsys, "play", "--backend", "scripted", "--questioner", "m", "--graph", "blind", "--out", tmp_path / "other"
    )


def test_tasks_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "combos" in say(capsys, "tasks")[1]
    code, told, _ = say(capsys, "tasks", "shapes", "--n", 2)
    assert code == 0 and "gold:" in told


def bomb(file: Path) -> None:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def test_bad_pictures_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: Path) -> None:
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:900])
    bomb(tmp_path / "bomb.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "foreign.tiff")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "vast.png").write_bytes(b"\0" * (21 * 2**20))
    expected = {
        "cut.png": "truncated",
        "bomb.png": "million pixels",
        "foreign.tiff": "convert it",
        "text.png": "convert it",
        "vast.png": "MB",
        "missing.png": "does not exist",
        ".": "folder",
    }
    for name, word in expected.items():
        told = refused(
            capsys, "play", "--image", tmp_path / name, "--question", "what is it ?", "--choices", "a", "b", "--out", tmp_path / "r"
        )
        assert word in told, (name, told)
    assert not (tmp_path / "r").exists()
    assert "cannot be read" in refused(capsys, "play", "--image", "x" * 300, "--question", "what ?", "--choices", "a", "b")


@pytest.mark.parametrize(
    ("question", "choices", "word"),
    [
        ("x" * 100_000, ("a", "b"), "100000 characters"),
        ("   ", ("a", "b"), "empty"),
        ("what\x1b[31m is it", ("a", "b"), "U\\+001B"),
        ("what is it ?", ("a", "A"), "more than once"),
        ("what is it ?", ("a",), "two or more"),
        ("what is it ?", (), "no choices"),
        ("what is it ?", ("a", ""), "empty"),
        ("what is the flurb ?", ("red", "blue"), "flurb"),
        ("what colour is the star ?", ("crimson", "blue"), "crimson"),
        ("what \udcff colour", ("red", "blue"), "U\\+DCFF"),
    ],
)
def test_bad_questions_and_choices_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: Path, question: str, choices: tuple[str, ...], word: str
) -> None:
    words = ["play", "--image", picture, "--question", question, *(["--choices", *choices] if choices else []), "--out", tmp_path / "r"]
    assert re.search(word, refused(capsys, *words))
    assert not (tmp_path / "r").exists()


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, word in (
        (("play", "--n", 0), "at least 1"),
        (("play", "--graph", "nonsense"), "unknown graph"),
        (("play", "--graph", "monologue:speed=3"), "monologue:key"),
        (("play", "--split", "dev"), "unknown split"),
        (("play", "--families", "nine"), "unknown question families"),
        (("play", "--image", "x.png"), "does not exist|--question"),
        (("play", "--task", "chess"), "invalid choice"),
        (("play", "--temperature", -1), "temperature"),
        (("play", "--temperature", "inf"), "temperature"),
        (("play", "--temperature", "nan"), "temperature"),
        (("play", "--graph", "direct", "--questioner", "m"), "has no such seat"),
        (("play", "--backend", "scripted", "--temperature", 1), "cannot be honoured"),
        (("play", "--backend", "sglang"), "addresses"),
        (("play", "--questioner", "q" * 300), "300 characters"),
        (("play", "--image", "x.png", "--question", "what ?", "--n", 3), "--n cannot be honoured"),
        (("eval", "--graph", "blind,nonsense", "--n", 2), "unknown graph"),
        (("eval", "--graph", "monologue,blind", "--n", 2, "--control", "shuffle-answers"), "no meaning"),
        (("tasks", "shapes", "--n", -3), "at least 1"),
        (("play", "--questioner", tmp_path / "empty"), "empty"),
        (("play", "--answerer", tmp_path / "nowhere"), "nowhere"),
        (("play", "--graph", "blind", "--control", "wrong-picture"), "control"),
        (("verify", tmp_path), "run.json"),
        (("train", "starter", "nobody"), "no recipe"),
        (("train", "starter", "answerer", "--set", "speed=1"), "speed"),
        (("train", "starter", "direct", "--out", tmp_path / "d"), "perception checkpoint"),
        (("eval", "--n", 4, "--graph", "blind", "--json", tmp_path / "empty"), "cannot write"),
    ):
        extra = ("--out", tmp_path / "r") if words[0] == "play" else ()
        told = refused(capsys, *words, *extra)
        assert re.search(word, told), (words, told)


def test_a_run_of_another_schema_and_a_file_in_place_of_a_folder_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    say(capsys, "play", "--n", 1, "--out", tmp_path / "run")
    info = tmp_path / "run" / "run.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "schema_version": 77}))
    for words in (("verify", tmp_path / "run"), ("view", tmp_path / "run"), ("play", "--n", 1, "--out", tmp_path / "run")):
        assert "schema version 77" in refused(capsys, *words)
    (tmp_path / "file").write_text("")
    for nowhere in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert "cannot write" in refused(capsys, "play", "--backend", "scripted", "--n", 1, "--out", nowhere)


def started(run: Path, n: int, before: str = "") -> subprocess.Popen[str]:
    """``monologue play`` as a process of its own."""
    words = ["play", "--n", str(n), "--concurrency", "4", "--out", str(run)]
    code = f"{before}\nimport sys\nfrom monologue.cli import main\nsys.exit(main({words!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(run: Path) -> list[str]:
    return [e.start.problem_id for e in RunReader(run).episodes() if e.complete] if (run / "run.json").exists() else []


def test_ctrl_c_keeps_what_was_finished_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(run, 40)
    while len(finished(run)) < 3 and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    kept = finished(run)
    assert process.returncode == 130 and "stopped" in told and "Traceback" not in told and 3 <= len(kept) < 40
    process = started(run, 40)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert sorted(finished(run)) == sorted(f"shapes/test/0/{i}" for i in range(40))


def test_a_full_disk_ends_in_one_sentence_with_every_finished_episode_kept(tmp_path: Path) -> None:
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (90000, 90000))"
    )
    process = started(tmp_path / "run", 40, limit)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2 and told.count("\n") == 1 and "cannot write" in told, told
    assert 0 < len(finished(tmp_path / "run")) < 40


def test_another_picture_under_the_same_question_is_another_problem(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: Path
) -> None:
    Shapes().problem("test", 3).pictures[0]().save(tmp_path / "other.png")
    asks = ("--question", "what colour is the star ?", "--choices", "red", "blue", "green", "--out", tmp_path / "run")
    for file in (picture, tmp_path / "other.png"):
        code, told, _ = say(capsys, "play", "--image", file, *asks)
        assert code == 0 and "from before" not in told
    assert len({episode.start.problem_id for episode in RunReader(tmp_path / "run").episodes()}) == 2


def test_pictures_are_seen_as_people_see_them(tmp_path: Path) -> None:
    from monologue.traces.images import open_picture

    turned, exif = Image.new("RGB", (20, 10), "red"), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (10, 20)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    Image.frombytes("I;16", (2, 1), struct.pack("<HH", 16000, 48000)).save(tmp_path / "deep.png")
    grey = open_picture(tmp_path / "deep.png")
    assert [grey.getpixel((x, 0)) for x in (0, 1)] == [(62, 62, 62), (187, 187, 187)]


def test_a_resumed_run_refuses_other_weights_under_the_same_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import shutil

    from monologue.seating import starter

    own = Path(shutil.copytree(starter("questioner"), tmp_path / "own"))
    words = ("play", "--graph", "blind", "--questioner", own, "--out", tmp_path / "run", "--n")
    assert say(capsys, *words, 1)[0] == 0
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (own / "model.safetensors").write_bytes(bytes(data))
    assert "begun with seats" in refused(capsys, *words, 2)


def test_an_interrupted_run_verifies_once_it_was_played_to_its_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(run, 30)
    while len(finished(run)) < 3 and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert 3 <= len(finished(run)) < 30
    assert say(capsys, "verify", run, "--no-replay")[0] == 1
    process = started(run, 30)
    process.communicate(timeout=120)
    assert process.returncode == 0
    code, told, _ = say(capsys, "verify", run, "--no-replay")
    assert code == 0 and "played again" in told


def test_an_eval_that_is_kept_is_resumed_and_not_doubled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert say(capsys, "eval", "--graph", "blind,monologue", "--n", 3, "--out", tmp_path / "e")[0] == 0
    assert len(list(RunReader(tmp_path / "e" / "monologue").episodes())) == 3
