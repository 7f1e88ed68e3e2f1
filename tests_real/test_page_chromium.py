"""The page in real headless Chromium: what a person sees, hears and does, and that hostile text does nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from chromium import browser, command, environment, served  # noqa: E402
from PIL import Image  # noqa: E402

from monologue.backends.base import Thought  # noqa: E402
from monologue.traces.recorder import Recorder  # noqa: E402
from monologue.traces.schema import ImageRef, calls_of  # noqa: E402
from monologue.traces.store import RunReader, RunWriter  # noqa: E402
from tests import page_runs as runs  # noqa: E402

WAIT = 8000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("page") / "run"
    return folder, runs.mixed(folder)


@pytest.fixture(scope="module")
def address(run: tuple[Path, dict[str, Any]]) -> Iterator[str]:
    with served(run[0]) as url:
        yield url


@pytest.fixture(scope="module")
def one_file(run: tuple[Path, dict[str, Any]]) -> str:
    file = run[0].parent / "page.html"
    subprocess.run(command("view", run[0], "--html", file), check=True, env=environment(), stdout=subprocess.DEVNULL)
    return file.as_uri()


def until(page: Any, expression: str, seconds: float = WAIT / 1000) -> None:
    """Waits for an expression to hold; the page's own policy forbids the browser to wait for text as code."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"waited {seconds} s for {expression}"
        time.sleep(0.02)


class Visit:
    """A page that writes down everything that goes wrong and every address it asks for."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.context = chromium.new_context(viewport={"width": 1300, "height": 850}, **options)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda one: self.faults.append(one.text) if one.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda one: self.faults.append(str(one)))
        self.page.on("dialog", lambda one: (self.faults.append("dialog"), one.dismiss()))
        self.page.on("request", lambda one: self.asked.append(one.url))
        self.page.goto(url)
        self.page.wait_for_selector(".row", timeout=WAIT)

    def close(self) -> None:
        assert self.faults == [], self.faults
        assert self.page.evaluate("window.pwned") is None
        self.context.close()

    def open(self, episode: str) -> None:
        self.page.evaluate("(id) => { location.hash = ''; history.replaceState(null, '', '#episode=' + id) }", episode)
        self.page.reload()
        self.page.wait_for_selector(f'code[title="{episode}"]', timeout=WAIT)


@pytest.fixture(params=["served", "one file"])
def visit(request: pytest.FixtureRequest, chromium: Any, address: str, one_file: str) -> Iterator[Visit]:
    visit = Visit(chromium, address if request.param == "served" else one_file)
    yield visit
    visit.close()


@pytest.fixture
def live_visit(chromium: Any, address: str) -> Iterator[Visit]:
    visit = Visit(chromium, address)
    yield visit
    visit.close()


def test_it_opens_with_the_first_episode_and_asks_for_nothing_outside(visit: Visit, run: tuple[Path, dict[str, Any]]) -> None:
    page = visit.page
    page.wait_for_selector(".turn", timeout=WAIT)
    assert page.locator(".row").count() == 6 and "rich star" in page.inner_text("main h2")
    assert page.locator(".turns > .turn").count() == 4
    text = page.inner_text("main")
    for word in ("calculator", "forty-two", "no action was found", "cut off", "brevity", "exact_match", "0.875", "Answer: red, right."):
        assert word in text, word
    picture = page.locator(".frame img")
    assert picture.evaluate("one => one.complete && one.naturalWidth") == 120
    assert "120 \u00d7 80" in picture.get_attribute("alt")
    home = page.url.split("#")[0].rsplit("/", 1)[0]
    assert all(url.startswith((home, "data:")) for url in visit.asked), visit.asked


def test_hover_and_focus_give_the_exact_values_of_the_trace(visit: Visit, run: tuple[Path, dict[str, Any]]) -> None:
    (episode,) = [one for one in RunReader(run[0]).episodes() if one.start.episode_id == run[1]["rich"]]
    call = calls_of(episode.spans)[0]
    assert call.sampled_logprobs is not None
    page = visit.page
    page.wait_for_selector("[data-turn='0'] .token", timeout=WAIT)
    tokens = page.locator("[data-turn='0'] .token")
    assert tokens.count() == len(call.sampled_ids)
    for place, value in enumerate(call.sampled_logprobs):
        tokens.nth(place).hover()
        shown = page.inner_text(".readout").splitlines()
        assert shown[1] == f"log-prob {page.evaluate('String', value)}" and float(shown[1].split()[1]) == value
        assert f"id {call.sampled_ids[place]}," in shown[0] and shown[3].endswith(page.evaluate("String", runs.ADVANTAGES[place]))
    page.mouse.move(5, 5)
    assert page.locator(".readout").count() == 0
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".readout").splitlines()[1] == "log-prob -1.5"
    assert "log-prob -1.5" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('[data-turn=\"0\"] .tokens')") is None, "a reply is one tab stop"


def test_shading_follows_the_mode_and_says_what_is_not_recorded(visit: Visit) -> None:
    page = visit.page
    tokens = page.locator("[data-turn='0'] .token")

    def strengths() -> list[float]:
        return [
            float(style.split(":")[1].rstrip("%;")) for style in tokens.evaluate_all("all => all.map(one => one.getAttribute('style'))")
        ]

    page.wait_for_selector(".token", timeout=WAIT)
    assert strengths() == pytest.approx([1.55, 23.25, 50.4, 0, 62, 7.75], abs=0.1)
    page.check("input[value=advantage]")
    assert strengths() == pytest.approx([7.75, 23.25, 46.5, 0, 62, 3.9], abs=0.1)
    assert "minus" in tokens.nth(1).get_attribute("class") and "plus" in tokens.nth(2).get_attribute("class")
    assert "advantage not recorded" in page.inner_text("[data-turn='3']")
    page.check("input[value=entropy]")
    assert strengths()[5] == 62 and "entropy not recorded" in page.inner_text("[data-turn='3']")
    page.check("input[value=plain]")
    assert page.locator(".token").count() == 0 and "look !" in page.inner_text("[data-turn='0']")


def test_the_region_and_the_patches_of_a_turn_lie_on_the_picture(visit: Visit) -> None:
    page = visit.page
    region = page.locator(".region rect")
    page.wait_for_selector(".region rect", timeout=WAIT)
    assert [float(region.get_attribute(name)) for name in ("x", "y", "width", "height")] == [30, 20, 60, 20]
    assert page.locator(".patch").count() == 0
    page.hover("[data-turn='1'] h3")
    assert page.locator(".patch").count() == 6 and page.locator(".region.lit").count() == 1
    opacities = page.locator(".patch").evaluate_all("all => all.map(one => Number(one.getAttribute('fill-opacity')))")
    assert opacities[1] == 0 and opacities[2] == 0.75, "what the turn attended to stays clear, the rest is dimmed"


def test_filters_and_text_in_outputs(visit: Visit) -> None:
    page = visit.page
    rows = page.locator(".row")

    def expect(count: int) -> None:
        until(page, f"document.querySelectorAll('.row').length === {count}")
        assert page.locator(".sum").inner_text().startswith(f"{count} episode")

    page.fill("[type=search]", "forty-two")
    expect(1)
    page.fill("[type=search]", "FELL over")
    expect(1)
    assert "failed" in rows.first.inner_text()
    page.fill("[type=search]", "")
    page.select_option("[aria-label=outcome]", "error")
    expect(3)
    page.click("text=clear")
    page.fill("[aria-label='reward from']", "0.5")
    page.fill("[aria-label='reward to']", "0.9")
    expect(1)
    page.click("text=clear")
    page.fill("[aria-label='turns from']", "3")
    expect(2)
    page.click("text=clear")
    page.select_option("[aria-label=role]", "answerer")
    expect(1)
    page.click("text=clear")
    page.select_option("[aria-label=order]", "low")
    expect(6)
    assert "question 3" not in rows.first.inner_text() and "question 3" in rows.last.inner_text()
    page.fill("[type=search]", "nothing like this")
    page.wait_for_selector("text=No episode passes the filter.", timeout=WAIT)


def test_everything_is_reached_by_keyboard(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    for key, place in (("ArrowDown", 1), ("j", 2), ("j", 3), ("k", 2), ("ArrowUp", 1), ("End", 5), ("Home", 0), ("PageDown", 5)):
        page.keyboard.press(key)
        chosen = page.locator("[role=option][aria-selected=true]")
        assert chosen.get_attribute("aria-posinset") == str(place + 1), key
        assert page.locator("#list").get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    page.wait_for_selector("main >> text=the engine fell over", timeout=WAIT)
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "H2"
    page.keyboard.press("Escape")
    page.keyboard.press("Home")
    page.wait_for_selector(".token", timeout=WAIT)
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.className || document.activeElement.name || document.activeElement.tagName"))
    assert {"mode", "graph", "SUMMARY"} <= seen and any(str(one).startswith("token") for one in seen), seen


def test_a_screen_reader_gets_names_and_roles(visit: Visit) -> None:
    page = visit.page
    page.wait_for_selector(".turn", timeout=WAIT)
    for role, name in (
        ("listbox", "episodes"),
        ("searchbox", "text in question"),
        ("radio", "entropy"),
        ("group", "graph and path"),
        ("img", "picture 1 of 1"),
    ):
        assert page.get_by_role(role, name=name).count() >= 1, (role, name)
    assert "right: " in page.locator("#list").get_by_role("option").first.text_content()
    path = page.locator(".graph svg").get_attribute("aria-label")
    assert path == "from start to ask, by look to answer, by reply to tools, to ask, by conclude to end"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, [tabindex="0"]')].filter((one) =>
            !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length)).map((one) => one.outerHTML)"""
    )
    assert nameless == [] and page.evaluate("document.documentElement.lang") == "en"


def test_hostile_text_is_text(visit: Visit, run: tuple[Path, dict[str, Any]]) -> None:
    page = visit.page
    visit.open(run[1]["hostile"])
    page.wait_for_selector(".turn", timeout=WAIT)
    text = page.inner_text("main")
    assert runs.HOSTILE[0] in text and runs.HOSTILE[1] in text
    assert page.locator("main script, main img[src=x], main a").count() == 0
    assert page.locator("main .mark:has-text('RLO')").count() >= 1 and page.locator("main .mark:has-text('ESC')").count() >= 1
    assert not any(control in text for control in "\u202e\u2066\u200b\ufeff\x1b\x00")
    assert not any(
        control in page.content().replace(page.evaluate("boot.served ? '' : document.getElementById('index').outerHTML"), "")
        for control in "\u202e\u2066"
    )
    huge = page.locator("[data-turn='1']")
    assert "200,000 characters" in huge.inner_text() and len(huge.inner_text()) < 10_000
    assert "tokenizer is not at hand" in huge.inner_text()
    for view in ("group", "episode"):
        page.click(f"nav >> text={view}")
        page.wait_for_timeout(200)
        for part in ("html", "main"):
            over = page.evaluate(f"(() => {{ const one = document.querySelector('{part}'); return one.scrollWidth - one.clientWidth }})()")
            assert over <= 0, f"no text widens {part}"
    page.locator("[data-turn='1'] .more").first.click()
    until(page, "document.querySelector('[data-turn=\"1\"]').textContent.length > 50000")


def test_the_group_stands_side_by_side(visit: Visit, run: tuple[Path, dict[str, Any]]) -> None:
    page = visit.page
    visit.open(run[1]["group"][1])
    page.click("nav >> text=group of 3")
    until(page, "document.querySelectorAll('.mate .verdict').length === 3")
    texts = page.locator(".mate").all_inner_texts()
    assert "(+0.667)" in texts[0] and "wrong" in texts[1] and "No answer" in texts[2]
    tops = page.locator(".mate").evaluate_all("all => all.map(one => one.getBoundingClientRect().top)")
    lefts = page.locator(".mate").evaluate_all("all => all.map(one => one.getBoundingClientRect().left)")
    assert len(set(tops)) == 1 and lefts == sorted(lefts) and len(set(lefts)) == 3
    page.locator(".mate button").first.click()
    page.wait_for_selector(f'code[title="{run[1]["group"][0]}"]', timeout=WAIT)


def test_curves_are_drawn_and_read_out(visit: Visit) -> None:
    page = visit.page
    page.click("nav >> text=training curves")
    curve = page.locator(".curve").first
    assert "grpo: loss" in curve.inner_text()
    assert len(curve.locator("polyline").get_attribute("points").split()) > 300
    curve.locator("svg").focus()
    page.keyboard.press("Home")
    assert "step 0: 1" in curve.inner_text()


def test_an_annotation_goes_to_the_log_and_comes_back(live_visit: Visit, run: tuple[Path, dict[str, Any]]) -> None:
    page = live_visit.page
    live_visit.open(run[1]["group"][0])
    page.fill(".remark textarea", "<b>good</b> \u202e")
    page.fill(".remark [type=number]", "-0.5")
    page.select_option(".remark select", index=1)
    page.keyboard.press("Tab")
    page.click(".remark button")
    page.wait_for_selector(".turn .note.person", timeout=WAIT)
    assert page.inner_text(".turn .note.person").startswith("score") and "<b>good</b>" in page.inner_text(".turn .note.person")
    assert "Written" in page.inner_text(".remark [role=status]")
    (note,) = [n for e in RunReader(run[0]).episodes() for n in e.annotations if n.source == "person:page"]
    assert (note.value, note.text, note.weight, note.scope) == (-0.5, "<b>good</b> \u202e".strip(), 0.0, "turn")
    page.select_option("[aria-label=outcome]", "noted")
    until(page, "document.querySelectorAll('.row').length === 1")


def test_a_written_file_offers_no_form(chromium: Any, one_file: str) -> None:
    visit = Visit(chromium, one_file, offline=True)
    visit.page.wait_for_selector(".turn", timeout=WAIT)
    assert visit.page.locator(".remark").count() == 0
    visit.close()


GROW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests import page_runs as runs
from monologue.traces.recorder import Recorder
from monologue.traces.store import RunWriter
recorder = Recorder(RunWriter(Path({run!r}), resume=True))
with runs.begun(recorder, 50, question="the long one ?") as episode:
    for turn in range(2):
        with episode.policy(role="questioner", node="ask") as call:
            call.record(**runs.facts(f"turn {{turn}}"))
        print("said", flush=True)
        sys.stdin.readline()
    episode.finish("blue")
for number in range(60, 65):
    runs.plain(recorder, number)
"""


def test_a_run_that_another_process_writes_is_followed(chromium: Any, tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    runs.plain(Recorder(writer), 0)
    writer.close()
    code, pipe = GROW.format(root=str(ROOT), run=str(tmp_path / "run")), subprocess.PIPE
    with served(tmp_path / "run") as url:
        visit = Visit(chromium, url)
        with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment()) as process:
            follow(visit.page, process)
            assert process.wait(20) == 0
        visit.close()


def follow(page: Any, process: Any) -> None:
    def go_on() -> None:
        process.stdin.write("\n")
        process.stdin.flush()

    process.stdout.readline()
    page.wait_for_selector(".row >> nth=1", timeout=WAIT)
    assert "unfinished" in page.locator(".row").nth(1).inner_text() and "1 episode under way" in page.inner_text(".sum")
    page.locator(".row").nth(1).click()
    page.wait_for_selector(".verdict >> text=has not ended", timeout=WAIT)
    until(page, "document.querySelectorAll('.turns > .turn').length === 1")
    go_on()
    until(page, "document.querySelectorAll('.turns > .turn').length === 2")
    go_on()
    until(page, "document.querySelectorAll('.row').length === 7")
    page.wait_for_selector(".verdict >> text=wrong", timeout=WAIT)
    assert page.locator("[aria-selected=true]").get_attribute("aria-posinset") == "2", "the choice stays"
    until(page, "!document.querySelector('.sum').textContent.includes('under way')")


def luminance(colour: str) -> float:
    red, green, blue = (int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_legible(chromium: Any, address: str, scheme: str) -> None:
    visit = Visit(chromium, address, color_scheme=scheme)
    page = visit.page
    page.wait_for_selector(".turn", timeout=WAIT)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    paper = luminance(page.evaluate("getComputedStyle(document.querySelector('.turn')).backgroundColor"))
    for selector in (".turn h3", ".turn .where", ".turn .reply", ".fault", ".turn .flag", ".verdict"):
        ink = luminance(page.evaluate("(s) => getComputedStyle(document.querySelector(s)).color", selector))
        ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert ratio >= 4.5, (scheme, selector, ratio)
    visit.close()


@pytest.mark.parametrize("kind", ["served", "one file"])
def test_ten_thousand_episodes_are_listed_with_few_elements(chromium: Any, tmp_path: Path, kind: str) -> None:
    runs.many(tmp_path / "run", 10_000)
    if kind == "one file":
        subprocess.run(command("view", tmp_path / "run", "--html", tmp_path / "page.html"), check=True, env=environment())
        look(Visit(chromium, (tmp_path / "page.html").as_uri()))
    else:
        with served(tmp_path / "run") as url:
            look(Visit(chromium, url))


def look(visit: Visit) -> None:
    page = visit.page
    until(page, "document.querySelector('.sum').textContent.startsWith('10,000')", 60)
    assert page.locator(".row").count() < 60
    page.focus("#list")
    page.keyboard.press("End")
    page.wait_for_selector("[aria-posinset='10000'][aria-selected=true]", timeout=WAIT)
    page.wait_for_selector("main >> text=question 9999 ?", timeout=WAIT)
    assert page.locator(".row").count() < 60
    visit.close()


def test_damage_is_told(chromium: Any, tmp_path: Path) -> None:
    runs.mixed(tmp_path / "run")
    (file,) = (tmp_path / "run" / "spans").glob("*.jsonl")
    file.write_bytes(b"<img src=x onerror=window.pwned=1>\n" + file.read_bytes())
    (tmp_path / "run" / "images").rename(tmp_path / "gone")
    with served(tmp_path / "run") as url:
        visit = Visit(chromium, url)
        visit.page.wait_for_selector("text=1 line of this run cannot be read", timeout=WAIT)
        visit.page.wait_for_selector("text=The run lacks picture", timeout=WAIT)
        visit.faults = [one for one in visit.faults if "404" not in one]
        visit.close()


def test_latent_steps_stand_with_the_turn_and_their_patches_on_the_picture(chromium: Any, tmp_path: Path) -> None:
    thoughts = (Thought((0, 4), 8.125, ("red", runs.HOSTILE[1]), (0.75, 0.25)), Thought((4,), 7.5, ("blue",), (1.0,)))
    writer = RunWriter(tmp_path / "run")
    with runs.begun(Recorder(writer)) as episode:
        picture = episode.store(Image.new("RGB", (120, 80), (200, 60, 40)))
        with episode.policy(role="thinker", node="think") as call:
            call.record(**runs.facts("red", images=(ImageRef(picture.sha256, 120, 80, (1, 4, 6), 1, 6, "p"),), thoughts=thoughts))
        episode.finish("red")
    writer.close()
    with served(tmp_path / "run") as url:
        visit = Visit(chromium, url)
        visit.page.wait_for_selector(".latents tbody tr", timeout=WAIT)
        first, second = visit.page.locator(".latents tbody tr").all_inner_texts()
        assert first.split("\t") == ["1", f"red 0.75, {runs.HOSTILE[1]} 0.25", "1, 5", "8.125"] and second.split("\t")[2] == "5"
        marks = visit.page.locator(".reread")
        assert [one.locator("text").text_content() for one in marks.all()] == ["1", "1 2"]
        left, right = (one.locator("rect").bounding_box() for one in marks.all())
        frame = visit.page.locator(".frame img").bounding_box()
        assert abs(left["x"] - frame["x"]) < 3 and abs(right["x"] - frame["x"] - frame["width"] / 3) < 3, "the second row's second of three"
        assert abs(right["y"] - frame["y"] - frame["height"] / 2) < 3
        visit.close()


def test_a_server_that_went_away_is_told_and_what_is_shown_stays(chromium: Any, run: tuple[Path, dict[str, Any]]) -> None:
    with served(run[0]) as url:
        visit = Visit(chromium, url)
        visit.page.wait_for_selector(".turn", timeout=WAIT)
    visit.page.wait_for_selector("[role=alert]", timeout=WAIT)
    assert visit.page.locator(".row").count() == 6 and visit.page.locator(".turn").count() == 4
    visit.context.close()


def listen() -> None:
    """A background job starts its children deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_it_cleanly(run: tuple[Path, dict[str, Any]]) -> None:
    words, pipe = command("view", run[0], "--no-browser"), subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment(), preexec_fn=listen) as process:
        assert process.stdout and process.stdout.readline().startswith("http://127.0.0.1:")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, told = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 0 and told == ""


def test_the_played_default_run_is_shown(chromium: Any, tmp_path: Path) -> None:
    """The scripted engine's own run, end to end."""
    words = ("play", "--backend", "scripted", "--n", 5, "--out", tmp_path / "run")
    subprocess.run(command(*words), check=True, env=environment(), stdout=subprocess.DEVNULL)
    (first, *_) = RunReader(tmp_path / "run").episodes()
    with served(tmp_path / "run") as url:
        visit = Visit(chromium, url)
        visit.open(first.start.episode_id)
        visit.page.wait_for_selector(".token", timeout=WAIT)
        said = json.loads(json.dumps(calls_of(first.spans)[0].output))
        assert visit.page.locator("[data-turn='0'] .tokens").text_content().strip() == said.strip()
        visit.close()
