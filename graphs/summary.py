"""What came of a play: one small record per episode, what an earlier play left in the run, and the bar that shows progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from monologue.tasks.base import Problem, Score, summarize
from monologue.traces.store import RunReader, RunWriter


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


def earlier(run: str | Path | RunWriter, graph: str, control: str | None) -> dict[tuple[str, int], Earlier]:
    """Episodes of this graph and control that the run already holds, by problem and sample."""
    path = Path(run.path if isinstance(run, RunWriter) else run)
    found: dict[tuple[str, int], Earlier] = {}
    if not (path / "run.json").exists():
        return found
    for episode in RunReader(path).episodes():
        start, end = episode.start, episode.end
        if start.graph != graph or start.extra.get("control") != control:
            continue
        key = (start.problem_id, start.sample_index)
        before = found.get(key, Earlier(0, None))
        ended = before.ended
        if end is not None and end.status == "ok":
            seconds = (end.ended_ns - start.started_ns) / 1e9
            last = {call.stream: len(call.prompt_ids) + len(call.sampled_ids) for call in episode.calls()}
            ended = Played(
                *key[:1],
                start.family,
                None,
                key[1],
                start.attempt,
                "ok",
                end.answer,
                None,
                end.turns,
                sum(last.values()),
                seconds,
            )
        found[key] = Earlier(max(before.attempts, start.attempt + 1), ended)
    return found


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
