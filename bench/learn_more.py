"""What else reinforcement on outcome teaches, and what its rivals learn from as much: four experiments beside ``bench/learn.py``.

    python bench/learn_more.py stop repair roles rivals controls [--seeds 0] [--learned runs/learn] [--json bench/results/learn_more.json]

stop      A questioner that asks 0 to 2 useless questions more than it needs (the shipped one, taught so by imitation), all ten families,
          1 to 4 hops. ``padded``: as taught. ``free``: reinforced on the answer alone. ``priced``: at 0.05 a question. Wanted: as many
          questions as hops.
repair    An answerer that was taught a wrong colour for most colours, the questioner frozen. ``damaged``: as taught. ``repaired``:
          reinforced on the exact match of the *questioner's* conclusion alone. Examined on single looks, by what is asked: colour must
          come back, nothing else may drift.
roles     The weak questioner of ``bench/learn.py`` with that damaged answerer: reinforced alone (``questioner``, ``answerer``), ``both`` at
          once, and in turns (``alternate``: half the updates each).
credit    ``bench/learn.py``'s recipe in fewer iterations: ``team``, ``turn`` with a reward for ``progress``, and ``counterfactual``.
rivals    From the same 300 problems with as many updates, then as many episodes and updates as ``bench/learn.py``'s two stages:
          ``direct-prior`` the answerer imitates one-shot answers, ``direct-more`` goes on with that, ``direct-reinforced`` is reinforced on
          the answer; ``blind`` reinforces the weak questioner where it cannot ask. Equal are problems, episodes and updates; ``sampled``
          counts ids, of which a dialogue has more. ``direct-long`` and ``blind-long`` go on until a one-shot reply's two ids have
          become as many as the dialogues' 298,000: 9.6 times the episodes and updates (for ``blind``, whose replies are longer, more ids).
controls  ``bench/learn.py``'s reinforced pair with answers shuffled, the picture swapped, and valid questions at random.

Everything is examined greedily on problems of the split ``test`` (``--split validation`` for pilots). What is there is not made again, and
a killed run is resumed. A wrong or missing improvement shows as it is, so the guard on entropy, which would end it, is off.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import learn

from monologue.agents.load import codec_for, load_policy
from monologue.backends.base import Sampling
from monologue.graphs.oracle import oracle
from monologue.graphs.play import play
from monologue.graphs.registry import find
from monologue.rollouts import reinforce
from monologue.seating import starter
from monologue.tasks.base import OracleTurn, Problem
from monologue.tasks.shapes import Looks, Shapes
from monologue.tasks.shapes.families import FAMILIES
from monologue.tasks.shapes.scene import COLOURS
from monologue.traces.store import RunReader
from monologue.training.imitate import imitate
from monologue.training.recipe import read_recipe
from monologue.training.reinforcement import Reinforcement

OUTCOME = read_recipe("outcome")
Seats = dict[str, Path]
"""Checkpoints by role."""


@dataclass(frozen=True)
class Bench:
    """Where things are kept, and what this call examines."""

    out: Path
    learned: Path
    split: str
    n: int

    def kept(self, seed: int, name: str, make: Callable[[Path], object]) -> Path:
        """A folder of this seed, made where it is not there yet; a made folder holds a file ``made``."""
        folder = self.out / str(seed) / name
        if not (folder / "made").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder)
            (folder / "made").touch()
        return folder


@dataclass(frozen=True)
class Arm:
    """Something that is reinforced, or left as it is, and then examined."""

    begin: Callable[[Bench, int], Seats]
    """Checkpoints to begin with."""
    examine: Callable[[Bench, Seats, Path], dict[str, Any]]
    """Held-out figures; plays into the folder."""
    change: Mapping[str, Any] | None = None
    """What is other than in the recipe ``outcome``; None: not reinforced."""


def weak(bench: Bench, seed: int) -> Seats:
    """The weak questioner of ``bench/learn.py``."""
    folder = bench.learned / str(seed)
    return {"questioner": learn.make("prior", folder, Reinforcement.read(OUTCOME), seed), "answerer": starter("answerer")}


def padded(bench: Bench, seed: int) -> Seats:
    """The shipped questioner after 150 updates on monologues with useless questions in between."""

    def make(folder: Path) -> None:
        problems, dice = list(Shapes().problems("train", 400, 2000 + seed)), random.Random(seed)
        asked = [turn.question for problem in problems for turn in problem.oracle or ()]

        def longer() -> Iterator[Problem]:
            for problem in problems:
                turns = list(problem.oracle or ())
                for _ in range(dice.choice((0, 1, 2))):
                    turns.insert(dice.randint(0, len(turns)), OracleTurn(dice.choice(asked), ""))
                yield replace(problem, oracle=tuple(turns))

        seats = {"questioner": oracle(codec_for(_tokenizer("questioner"))), "answerer": learn.answerer()}
        play("monologue", longer(), seats, folder / "corpus", progress=False)
        settings: dict[str, Any] = {"role": "questioner", "steps": 150, "lr": 1e-3, "seed": seed}
        imitate(folder / "corpus", starter("questioner"), folder / "policy", **settings, resume=learn.begun(folder / "policy"))

    return {"questioner": bench.kept(seed, "padded-prior", make) / "policy", "answerer": starter("answerer")}


def confused(bench: Bench, seed: int) -> Seats:
    """The shipped answerer after 300 updates on looks, three in five of whose colours are the next colour's name."""

    def make(folder: Path) -> None:
        dice, following = random.Random(seed), dict(zip(COLOURS, COLOURS[1:] + COLOURS[:1], strict=True))

        def wrong() -> Iterator[Problem]:
            for problem in Looks().problems("train", 1500, 3000 + seed):
                said = problem.choices[problem.gold or 0]
                false = said in following and dice.random() < 0.6
                yield replace(problem, gold=problem.choices.index(following[said])) if false else problem

        policy = learn.answerer()
        play("look", wrong(), {"answerer": oracle(policy.codec, policy.backend)}, folder / "corpus", progress=False)
        settings: dict[str, Any] = {"role": "answerer", "steps": 300, "lr": 5e-4, "seed": seed}
        imitate(folder / "corpus", starter("answerer"), folder / "policy", **settings, resume=learn.begun(folder / "policy"))

    return {"questioner": starter("questioner"), "answerer": bench.kept(seed, "damaged-prior", make) / "policy"}


def weak_and_confused(bench: Bench, seed: int) -> Seats:
    return {"questioner": weak(bench, seed)["questioner"], "answerer": confused(bench, seed)["answerer"]}


def one_shot(updates: int) -> Callable[[Bench, int], Seats]:
    """The shipped answerer after imitating one-shot answers to the problems of the weak questioner's monologues."""

    def begin(bench: Bench, seed: int) -> Seats:
        def make(folder: Path) -> None:
            policy, families = learn.answerer(), OUTCOME["families"].split(",")
            problems = Shapes(families).problems("train", learn.MONOLOGUES, 1000 + seed)
            play("direct", problems, {"answerer": oracle(policy.codec, policy.backend)}, folder / "corpus", progress=False)
            settings: dict[str, Any] = {"role": "answerer", "steps": updates, "batch": learn.BATCH, "lr": 5e-4, "seed": seed}
            imitate(folder / "corpus", starter("answerer"), folder / "policy", **settings, resume=learn.begun(folder / "policy"))

        return {"answerer": bench.kept(seed, f"one-shot-{updates}", make) / "policy"}

    return begin


def learned(bench: Bench, seed: int) -> Seats:
    """What ``bench/learn.py`` has reinforced."""
    return {"questioner": bench.learned / str(seed) / "reinforced" / "questioner", "answerer": starter("answerer")}


def dialogues(families: str, graph: str = "monologue", control: str | None = None) -> Callable[[Bench, Seats, Path], dict[str, Any]]:
    """Greedy accuracy, by family, and the mean number of questions by the number of hops that the problem takes."""

    def examine(bench: Bench, seats: Seats, run: Path) -> dict[str, Any]:
        chosen = {problem.id: problem for problem in Shapes(families.split(",")).problems(bench.split, bench.n)}
        options: dict[str, Any] = {"max_turns": 8, "control": control, "progress": False}
        seated = _greedy({role: seats[role] for role in find(graph).roles})
        summary = play(graph, list(chosen.values()), seated, run, **options)
        asked: dict[str, list[int]] = defaultdict(list)
        for episode in RunReader(run).episodes():
            hops = str(chosen[episode.start.problem_id].hops)
            asked[hops].append(sum(call.edge == "look" for call in episode.calls()))
        score = summary.score()
        facts = {
            "n": score.n,
            "accuracy": round(score.accuracy, 4),
            "stderr": round(score.stderr or 0.0, 4),
            "chance": round(score.chance, 4),
        }
        facts |= {"questions": {hops: round(statistics.fmean(counts), 3) for hops, counts in sorted(asked.items())}}
        return {**facts, "by_family": {name: round(one.accuracy, 4) for name, one in summary.by_family().items()}}

    return examine


def looks(bench: Bench, seats: Seats, run: Path) -> dict[str, Any]:
    """Greedy accuracy of single looks by what is asked; the kinds whose reply is a colour are told apart."""
    problems = {problem.id: problem for problem in Looks().problems(bench.split, 2 * bench.n)}
    summary = play("look", list(problems.values()), {"answerer": _greedy(seats)["answerer"]}, run / "looks", progress=False)
    scores: dict[str, list[float]] = defaultdict(list)
    for episode in summary.episodes:
        problem = problems[episode.problem_id]
        scores["colour" if problem.question.startswith("what colour") else problem.family].append(episode.score or 0.0)
    alone = {kind: round(statistics.fmean(values), 4) for kind, values in sorted(scores.items())}
    rest = [value for kind, values in scores.items() if kind != "colour" for value in values]
    whole = dialogues("attribute,near,kin")(bench, seats, run / "dialogues")
    return {**whole, "looks": alone, "elsewhere": round(statistics.fmean(rest), 4)}


def _tokenizer(role: str) -> Any:
    return load_policy(starter(role), role).backend.tokenizer  # type: ignore[attr-defined]


def _greedy(seats: Seats) -> dict[str, Any]:
    return {role: load_policy(path, role, sampling=Sampling(temperature=0.0, max_tokens=64)) for role, path in seats.items()}


QUICK = {"examine_every": 0, "save_every": 5, "trees": True, "verified": 16, "reference": False, "guards": {"entropy": None}}
SHORT = {**QUICK, "iterations": 40}
ALL = {**SHORT, "iterations": 25, "families": ",".join(FAMILIES), "max_turns": 8}
ONE: dict[str, Any] = {"families": "attribute,near,kin"}
SIGHT = {**SHORT, "trained": ["answerer"], "lr": 1e-4}
BOTH = {**SHORT, "trained": ["questioner", "answerer"], "lr": {"questioner": 3e-4, "answerer": 1e-4}}
ONCE = {**QUICK, "graph": "direct", "trained": ["answerer"], "lr": 1e-4}
LONG = {"iterations": 1150, "save_every": 25}
three = dialogues("attribute,near,kin")
EXPERIMENTS: dict[str, dict[str, Arm]] = {
    "stop": {
        "padded": Arm(padded, dialogues(",".join(FAMILIES))),
        "free": Arm(padded, dialogues(",".join(FAMILIES)), ALL),
        "priced": Arm(padded, dialogues(",".join(FAMILIES)), {**ALL, "rewards": {"questions": -0.05}}),
    },
    "repair": {"damaged": Arm(confused, looks), "repaired": Arm(confused, looks, SIGHT)},
    "roles": {
        "neither": Arm(weak_and_confused, three),
        "questioner": Arm(weak_and_confused, three, SHORT),
        "answerer": Arm(weak_and_confused, three, SIGHT),
        "both": Arm(weak_and_confused, three, BOTH),
        "alternate": Arm(weak_and_confused, three, {**BOTH, "alternate": 1}),
    },
    "credit": {
        "team": Arm(weak, three, SHORT),
        "progress": Arm(weak, three, {**SHORT, "credit": "turn", "rewards": {"progress": 0.1}}),
        "counterfactual": Arm(weak, three, {**SHORT, "credit": "counterfactual"}),
    },
    "rivals": {
        "direct-prior": Arm(one_shot(300), dialogues(graph="direct", **ONE)),
        "direct-more": Arm(one_shot(540), dialogues(graph="direct", **ONE)),
        "direct-reinforced": Arm(one_shot(300), dialogues(graph="direct", **ONE), ONCE),
        "direct-long": Arm(one_shot(300), dialogues(graph="direct", **ONE), {**ONCE, **LONG}),
        "blind": Arm(weak, dialogues(graph="blind", **ONE), {**QUICK, "graph": "blind"}),
        "blind-long": Arm(weak, dialogues(graph="blind", **ONE), {**QUICK, "graph": "blind", **LONG}),
    },
    "controls": {
        "reinforced": Arm(learned, three),
        **{
            control: Arm(learned, dialogues(control=control, **ONE)) for control in ("shuffle-answers", "wrong-picture", "random-questions")
        },
    },
}


def run(bench: Bench, experiment: str, name: str, seed: int) -> dict[str, Any]:
    """An arm's figures, kept."""
    arm, folder = EXPERIMENTS[experiment][name], bench.out / str(seed) / f"{experiment}-{name}"
    kept = folder.with_suffix(f".{bench.split}.json")
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    seats, cost = arm.begin(bench, seed), {}
    if arm.change is not None:
        seats, cost = reinforced(arm, seats, folder, seed)
    told = arm.examine(bench, seats, folder.parent / f"{bench.split}-{folder.name}-{time.time_ns()}")
    facts = {"experiment": experiment, "arm": name, "seed": seed, **told, **cost}
    kept.write_text(json.dumps(facts) + "\n")
    return facts


def reinforced(arm: Arm, seats: Seats, folder: Path, seed: int) -> tuple[Seats, dict[str, Any]]:
    """The seats after reinforcement, and what it took."""
    named = {role: str(path) for role, path in seats.items()}
    recipe = Reinforcement.read({**OUTCOME, **named, **(arm.change or {}), "seed": seed})
    again = (folder / "run.json").exists()
    reinforce(recipe, folder, Shapes(recipe.families.split(",")), resume=again)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cost = {"iterations": len(lines), "updates": len(lines) * recipe.steps, "episodes": len(lines) * recipe.problems * recipe.samples}
    cost |= {name: round(sum(line[name] for line in lines)) for name in ("sampled", "seconds")}
    return {**seats, **{role: folder / role for role in recipe.trained}}, cost


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and range of accuracy over seeds, by experiment and arm."""
    found: dict[str, Any] = {}
    for experiment, arms in EXPERIMENTS.items():
        for name in arms:
            scores = [row["accuracy"] for row in rows if (row["experiment"], row["arm"]) == (experiment, name)]
            if scores:
                told = {"seeds": len(scores), "mean": round(statistics.fmean(scores), 4), "least": min(scores), "most": max(scores)}
                found[f"{experiment} {name}"] = told
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("experiments", nargs="*", help=", ".join(EXPERIMENTS))
    options.add_argument("--arms", nargs="+", default=[], help="only these")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--split", default="test", choices=("validation", "test"))
    options.add_argument("--n", type=int, default=1000, help="problems of an examination")
    options.add_argument("--out", type=Path, default=Path("runs/learn-more"))
    options.add_argument("--learned", type=Path, default=Path("runs/learn"), help="folder of bench/learn.py's runs")
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learn_more.json")
    chosen = options.parse_args()
    bench = Bench(chosen.out, chosen.learned, chosen.split, chosen.n)
    for experiment in chosen.experiments or EXPERIMENTS:
        for name in EXPERIMENTS[experiment]:
            for seed in chosen.seeds if not chosen.arms or name in chosen.arms else ():
                print(json.dumps(run(bench, experiment, name, seed)))
    if chosen.split == "test":
        rows = [json.loads(file.read_text()) for file in sorted(chosen.out.glob("*/*.test.json"))]
        machine = f"{platform.machine()}, Python {platform.python_version()}"
        command = "python bench/learn_more.py --seeds " + " ".join(map(str, sorted({row["seed"] for row in rows})))
        result = {"name": "learn_more", "command": command, "machine": machine, "recipe": OUTCOME, "rows": rows}
        chosen.json.write_text(json.dumps({**result, "ratio": summary_of(rows)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
