"""What came of a play: one small record per episode, what an earlier play left in the run, and the bar that shows progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monologue.agents.policy import Usage
from monologue.graphs.state import GraphError
from monologue.tasks.base import Problem, Score, summarize
from monologue.traces import names
from monologue.traces.store import Episode, RunReader, RunWriter

FIXED = (
    *("graph", "seed", "max_turns", "weight", "control", "capture", "seats"),
    *("task", "split", "families", "questioner", "answerer", "temperature", "top_p", "max_tokens"),
)
"""Settings that may not change when a run is resumed."""


@dataclass(frozen=True, slots=True)
class Played:
    """What came of one episode."""

    problem_id: str
    """Its problem."""
    family: str
    """The problem's question family; empty where a task has none."""
    chance: float | None
    """Probability that a guess among the choices is right; None without choices."""
    sample: int
    """Which of the problem's samples."""
    attempt: int
    """How often it was begun before."""
    status: str
    """ok or failed."""
    answer: str | None = None
    """The conclusion; None where the budget ended first or the episode failed."""
    score: float | None = None
    """The task's score; None where there is no gold answer or the episode failed."""
    turns: int = 0
    """Calls of policies and tools."""
    tokens: int = 0
    """Length of all streams together, prompts and sampled ids."""
    usage: tuple[Usage, ...] = ()
    """Length and cached part of each call."""
    seconds: float = 0.0
    """Wall time, waiting for the engine included."""
    error: str | None = None
    """Why it failed."""


def played(problem: Problem, sample: int, attempt: int, status: str) -> Played:
    """The record's beginning, taken from the problem."""
    chance = 1 / len(problem.choices) if problem.choices else None
    return Played(problem.id, problem.family, chance, sample, attempt, status)


@dataclass
class Summary:
    """What came of a play."""

    episodes: list[Played] = field(default_factory=list)
    """Every episode, those of an earlier play of the same run included."""
    skipped: int = 0
    """How many of them were not played now, because they had ended well before."""

    def add(self, episode: Played, earlier: bool = False) -> None:
        self.episodes.append(episode)
        self.skipped += earlier

    @property
    def ok(self) -> int:
        """Episodes that ended well, with or without an answer."""
        return sum(episode.status == "ok" for episode in self.episodes)

    @property
    def failed(self) -> list[Played]:
        """Episodes that broke."""
        return [episode for episode in self.episodes if episode.status != "ok"]

    def score(self) -> Score:
        """Accuracy over the scored episodes, with its standard error and chance. Raises ValueError where there are none."""
        return _score(self.episodes)

    def cached(self) -> dict[int, float]:
        """Share of prompt tokens that engines had in a cache, by number of the call in its stream from 0; empty where none says."""
        said = [call for episode in self.episodes for call in episode.usage if call.cached is not None]
        prompts, held = Counter[int](), Counter[int]()
        for call in said:
            prompts[call.turn] += call.prompt
            held[call.turn] += call.cached or 0
        return {turn: held[turn] / prompts[turn] for turn in sorted(prompts)}

    def by_family(self) -> dict[str, Score]:
        """One Score per question family, in name order."""
        names = sorted({episode.family for episode in self.episodes if episode.score is not None})
        return {name: _score([episode for episode in self.episodes if episode.family == name]) for name in names}


def _score(episodes: Sequence[Played]) -> Score:
    scored = [(episode.score, episode.chance or 0.0) for episode in episodes if episode.score is not None]
    return summarize([score for score, _ in scored], [chance for _, chance in scored])


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier play left of one episode."""

    attempts: int
    """How often it was begun."""
    ended: Played | None
    """How it ended, where it ended well; the problem's facts are filled in when it is met again."""
    captured: bool = True
    """Its answer is there to be judged again; otherwise the score that was recorded stands."""


def earlier(run: str | Path | RunWriter, settings: Mapping[str, Any]) -> dict[tuple[str, int], Earlier]:
    """Episodes of this graph and control that the run already holds, by problem and sample.

    Raises GraphError where the run was begun with other settings, since its episodes would not be of one kind. Whoever plays
    several kinds into one run passes a RunWriter, and is not asked. A pen that was named looks at its own episodes only.
    """
    path = run.path if isinstance(run, RunWriter) else Path(run)
    found: dict[tuple[str, int], Earlier] = {}
    if not (path / "run.json").exists():
        return found
    reader = RunReader(path, run.name if isinstance(run, RunWriter) and run.named else "*")
    before = {"weight": 1.0, **reader.info.get("config", {})}  # older runs have no other
    other = [key for key in FIXED if key in before and key in settings and before[key] != settings[key]]
    if other and not isinstance(run, RunWriter):
        told = ", ".join(f"{key}={before[key]!r} (now {settings[key]!r})" for key in other)
        raise GraphError(f"the run in {str(path)!r} was begun with {told}; resume it with the same, or name another folder")
    for episode in reader.episodes():
        start = episode.start
        if (start.graph, start.extra.get("control")) == (settings["graph"], settings["control"]):
            key = (start.problem_id, start.sample_index)
            last = found.get(key, Earlier(0, None))
            ended = _ended(episode) if episode.complete else last.ended
            found[key] = Earlier(max(last.attempts, start.attempt + 1), ended, last.captured and "capture" not in start.extra)
    return found


def _ended(episode: Episode) -> Played:
    start, end = episode.start, episode.end
    assert end is not None
    counted: list[Mapping[str, Any]] = [span.attributes for span in episode.spans if names.INPUT_TOKENS in span.attributes]
    lengths = {facts[names.STREAM]: int(facts[names.INPUT_TOKENS]) + int(facts[names.OUTPUT_TOKENS]) for facts in counted}
    usage = tuple(
        Usage(facts[names.TURN], facts[names.INPUT_TOKENS], facts[names.OUTPUT_TOKENS], facts.get(names.CACHED_TOKENS)) for facts in counted
    )
    scores = [note.value for note in episode.annotations if note.name == "exact_match" and note.span_id is None]
    return Played(
        problem_id=start.problem_id,
        family=start.family,
        chance=None,
        sample=start.sample_index,
        attempt=start.attempt,
        status="ok",
        answer=end.answer,
        score=scores[-1] if scores else None,
        turns=end.turns,
        tokens=sum(lengths.values()),
        usage=usage,
        seconds=(end.ended_ns - start.started_ns) / 1e9,
    )


def met_again(ended: Played, problem: Problem, score: float | None) -> Played:
    """An episode of an earlier play, judged now."""
    return replace(ended, family=problem.family, chance=played(problem, 0, 0, "ok").chance, score=score)


@contextmanager
def progress_bar(wanted: bool, name: str, total: int | None) -> Iterator[Callable[[Played], None]]:
    """Shows finished episodes and the running accuracy on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield lambda episode: None
        return
    right = scored = 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, note="")

        def advance(episode: Played) -> None:
            nonlocal right, scored
            if episode.score is not None:
                right, scored = right + episode.score, scored + 1
            bar.update(task, advance=1, note=f"accuracy {right / scored:.3f}" if scored else "")

        yield advance
