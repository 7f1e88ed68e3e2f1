"""A crew of processes: the same run as one process plays, resumed, refused, interrupted and broken as one process is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from monologue.agents.load import load_policy
from monologue.agents.policy import Policy
from monologue.backends.base import BackendError, Sampling
from monologue.cli import main
from monologue.graphs.crew import Crew
from monologue.graphs.play import play
from monologue.graphs.state import GraphError
from monologue.proof import verify
from monologue.seating import starter
from monologue.tasks.shapes import Shapes
from monologue.traces.store import RunError, RunReader

ROLES = ("questioner", "answerer")


def sampled() -> dict[str, Policy]:
    return {role: load_policy(starter(role), role, sampling=Sampling(temperature=1.0)) for role in ROLES}


def missing(place: str) -> dict[str, Policy]:
    return {"questioner": load_policy(place, "questioner")}


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(sampled, 2) as found:
        yield found


def said(run: Path) -> dict[tuple[str, int], list[tuple[int, ...]]]:
    """Sampled ids of each episode, by problem and sample."""
    episodes = RunReader(run).episodes()
    return {(e.start.problem_id, e.start.sample_index): [call.sampled_ids for call in e.calls()] for e in episodes}


def test_a_crew_plays_the_run_that_one_process_plays(crew: Crew, tmp_path: Path) -> None:
    problems = list(Shapes().problems("validation", 9))
    together = crew.play("monologue", problems, tmp_path / "crew", samples=2, concurrency=8)
    alone = play("monologue", problems, sampled(), tmp_path / "alone", samples=2, progress=False)
    assert len(together.episodes) == 18 and not together.failed
    assert said(tmp_path / "crew") == said(tmp_path / "alone")
    assert together.score().accuracy == pytest.approx(alone.score().accuracy)
    assert all(check.ok for check in verify(tmp_path / "crew"))
    again = crew.play("monologue", problems, tmp_path / "crew", samples=2)
    assert again.skipped == 18 and len(list(RunReader(tmp_path / "crew").episodes())) == 18


def test_controls_swap_the_same_problems_in_a_crew(crew: Crew, tmp_path: Path) -> None:
    problems = list(Shapes().problems("validation", 6))
    crew.play("monologue", problems, tmp_path / "crew", control="wrong-picture")
    play("monologue", problems, sampled(), tmp_path / "alone", control="wrong-picture", progress=False)
    partners = [{e.start.problem_id: e.start.extra["partner"] for e in RunReader(tmp_path / name).episodes()} for name in ("crew", "alone")]
    assert partners[0] == partners[1] and len(partners[0]) == 6


def test_what_cannot_travel_is_refused(crew: Crew, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="'listener' does not travel"):
        crew.play("monologue", [], tmp_path, listener=print)
    with pytest.raises(GraphError, match="no seat for answerer"):
        crew.play("blind", list(Shapes().problems("validation", 2)), tmp_path / "run")
    with pytest.raises(GraphError, match="processes must be at least 1, got 0"):
        Crew(sampled, 0)
    with pytest.raises(GraphError, match="0 <= k < n"):
        play("monologue", [], sampled(), tmp_path, part=(2, 2))


def test_policies_that_cannot_be_seated_are_told_as_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="nowhere"):
        Crew(partial(missing, str(tmp_path / "nowhere")), 1)


def test_a_process_that_dies_ends_the_play_with_what_was_finished_kept(tmp_path: Path) -> None:
    with Crew(sampled, 2) as crew:
        problems = list(Shapes().problems("validation", 400))
        victim = next(iter(crew._pool._processes.values()))
        killer = subprocess.Popen([sys.executable, "-c", f"import os,time; time.sleep(1.0); os.kill({victim.pid}, {signal.SIGKILL:d})"])
        with pytest.raises(RunError, match="a process of the crew died"):
            crew.play("monologue", problems, tmp_path / "run", concurrency=4)
        killer.wait()
    kept = [episode for episode in RunReader(tmp_path / "run").episodes() if episode.complete]
    assert 0 < len(kept) < 400


def test_the_command_line_shares_episodes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["play", "--backend", "scripted", "--n", "10", "--processes", "2", "--out", run]) == 0
    assert "10 episodes ended well, 0 failed" in capsys.readouterr().out
    figures = tmp_path / "e.json"
    words = ["eval", "--graph", "direct", "--backend", "scripted", "--n", "6", "--processes", "2", "--json", str(figures)]
    assert main(words) == 0 and json.loads(figures.read_text())[0]["n"] == 6
    assert main(["play", "--processes", "2", "--live"]) == 2
    assert "--processes 2 shares many episodes out; --live need one process" in capsys.readouterr().err
    assert main(["play", "--processes", "0"]) == 2


def test_ctrl_c_keeps_what_a_crew_has_finished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["-m", "monologue", "play", "--n", "2000", "--processes", "2", "--concurrency", "4", "--out", str(run)]
    playing = subprocess.Popen([sys.executable, *words], start_new_session=True, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if run.exists() and sum(episode.complete for episode in RunReader(run).episodes()) >= 2:
            break
        time.sleep(0.1)
    os.killpg(playing.pid, signal.SIGINT)
    _, told = playing.communicate(timeout=60)
    assert playing.returncode == 130 and "goes on from there" in told, told
    assert "Traceback" not in told, told
    assert sum(episode.complete for episode in RunReader(run).episodes()) >= 2
