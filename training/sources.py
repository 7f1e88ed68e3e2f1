"""Where experience comes from: episodes that are played now, or runs that were logged before. Both give rows, iteration by iteration.

``Played`` joins by files what must not be joined by imports: it saves the weights of an iteration, has the stage load them and play,
rewards what came of it and reads the rows back as they lie on disk. Episodes that are there already, from a life that was killed, are
neither played again nor lost.

``Logged`` holds the rows of old runs and deals them out in a seeded order, each once before any comes again. Whole groups stay together,
since an advantage is a comparison within one.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from monologue.traces.images import PictureError
from monologue.traces.store import RunReader, RunWriter
from monologue.training import credit
from monologue.training.gate import GateError
from monologue.training.policies import Learner
from monologue.training.recipe import RecipeError
from monologue.training.replay import replay
from monologue.training.rewards import Reward, Wanted, give
from monologue.training.rows import Counts, Row, ordered, read_rows


class Stage(Protocol):
    """Where episodes are played."""

    def play(self, iteration: int, pen: RunWriter) -> None:
        """Plays an iteration's episodes, those that the pen has not written yet."""
        ...

    def begin(self, role: str, source: str, version: str) -> None:
        """A role is to play with the weights of ``source``, folder or Hub name."""
        ...

    def push(self, role: str, folder: Path, version: str) -> None:
        """Other weights for a role."""
        ...

    def examine(self, iteration: int) -> dict[str, float]:
        """Held-out figures of the weights that were pushed last."""
        ...

    def policy(self, role: str) -> str:
        """Name of a role's policy across its weights versions."""
        ...

    def rewards(self) -> Mapping[str, Reward]:
        """Rewards, and other things to be noted, that only those who play can tell."""
        ...


class Source(Protocol):
    """Where rows come from."""

    def rows(self, iteration: int) -> list[Row]:
        """An iteration's rows, stream by stream, in an order that does not depend on time."""
        ...

    def picture(self, sha256: str) -> Any:
        """A stored picture. Raises PictureError."""
        ...

    def note(self, iteration: int, rows: Sequence[Row], advantages: Mapping[str, float | Sequence[float]], source: str) -> None:
        """Writes advantages into the trace."""
        ...


class Played:
    """Episodes of the policies as they are now, in the run ``out``."""

    def __init__(
        self,
        out: Path,
        stage: Stage,
        learners: Mapping[str, Learner],
        rewards: Wanted,
        version: Callable[[str, int], str],
        *,
        keep: int,
        main: bool,
        wait: Callable[[], None],
    ) -> None:
        """``version`` names a role's weights in an iteration; ``main`` is True in the one process that plays, for which others ``wait``."""
        self.out, self.stage, self._learners, self._version = out, stage, learners, version
        self._rewards = rewards
        self._keep, self._main, self._wait = keep, main, wait
        self._pushed = {role: version(role, 0) for role in learners}
        for role, learner in learners.items() if main else ():
            stage.begin(role, learner.checkpoint.source, self._pushed[role])

    def push(self, iteration: int) -> None:
        """Has the stage load what has changed."""
        for role, learner in self._learners.items():
            version = self._version(role, iteration)
            if version != self._pushed[role]:
                home = self.out / "checkpoints" / self.stage.policy(role)
                learner.save(home / version, self._main)
                if self._main:
                    self.stage.push(role, home / version, version)
                    kept = sorted(home.iterdir(), key=lambda folder: folder.stat().st_mtime)
                    for old in kept[: -self._keep]:
                        shutil.rmtree(old)
            self._pushed[role] = version

    def rows(self, iteration: int) -> list[Row]:
        name = f"{iteration:06d}"
        self.push(iteration)
        if self._main:
            pen = RunWriter(self.out, resume=True, name=name)
            self.stage.play(iteration, pen)
            give(RunReader(self.out, name), pen, self._rewards)
            pen.close()
        self._wait()
        return ordered(list(read_rows(RunReader(self.out, name), self._learners)))

    def picture(self, sha256: str) -> Any:
        return RunReader(self.out).picture(sha256)

    def note(self, iteration: int, rows: Sequence[Row], advantages: Mapping[str, float | Sequence[float]], source: str) -> None:
        if self._main:
            pen = RunWriter(self.out, resume=True, name=f"{iteration:06d}")
            credit.write(pen, rows, advantages, source)
            pen.close()


class Logged:
    """Rows of old runs."""

    def __init__(self, runs: Sequence[str], roles: Sequence[str], size: int, seed: int) -> None:
        """``size`` rows an iteration, or a few more where a group needs them. Raises RunError, RecipeError for a run that is given twice,
        and GateError where there are no rows.
        """
        self._readers = [RunReader(run) for run in runs]
        _distinct(self._readers)
        self._seed, self._size = seed, size
        counts = Counts()
        self._groups = _groups([row for reader in self._readers for row in read_rows(reader, roles, counts)])
        if not self._groups:
            passed = "".join(f"; passed over: {count} x {cause}" for cause, count in counts.skipped.items())
            raise GateError(f"nothing of {', '.join(roles)} to learn from in {', '.join(runs)}{passed}; look with 'monologue view'")
        self._dealt: list[list[Row]] = []

    def prove(self, calls: int, tolerance: float) -> None:
        """Replays some calls of each run with the weights that sampled them. Raises GateError that names check and span."""
        for reader in self._readers:
            checks = replay(reader.path, tolerance=tolerance, calls=calls)
            broken = next((check for check in checks if not check.ok), None)
            if broken is not None:
                told = f"{reader.path}: the check {broken.name!r} does not hold: {broken.detail} (span {broken.span})"
                raise GateError(f"{told}; 'monologue verify' shows more, and proof=0 leaves this proof out")

    def rows(self, iteration: int) -> list[Row]:
        while len(self._dealt) <= iteration:
            self._deal()
        return ordered(self._dealt[iteration])

    def picture(self, sha256: str) -> Any:
        for reader in self._readers:
            if (reader.path / "images" / f"{sha256}.png").is_file():
                return reader.picture(sha256)
        raise PictureError(f"none of the runs has the picture {sha256}")

    def note(self, iteration: int, rows: Sequence[Row], advantages: Mapping[str, float | Sequence[float]], source: str) -> None:
        """Old runs stay as they are."""

    def _deal(self) -> None:
        """One round over all groups, in an order of its own."""
        order = random.Random(f"{self._seed}/{len(self._dealt)}").sample(sorted(self._groups), len(self._groups))
        hand: list[Row] = []
        for key in order:
            hand += self._groups[key]
            if len(hand) >= self._size:
                self._dealt.append(hand)
                hand = []
        if hand:
            self._dealt.append(hand)


def _distinct(readers: Sequence[RunReader]) -> None:
    known: dict[str, Path] = {}
    for reader in readers:
        name = str(reader.info["run_id"])
        if name in known:
            told = f"{str(known[name])!r} and {str(reader.path)!r}, which are one"
            raise RecipeError(f"expected different runs, got {told}; name it once")
        known[name] = reader.path


def _groups(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Whole episodes, by problem and by the weights of all roles together: what is compared with each other stays together."""
    weights: dict[str, set[str]] = {}
    for row in rows:
        weights.setdefault(row.episode_id, set()).add(f"{row.role}={row.pieces[0].weights_version}")
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row.group_id, *sorted(weights[row.episode_id])), []).append(row)
    return found
