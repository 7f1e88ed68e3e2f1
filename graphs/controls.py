"""Controls: the answerer's evidence is about another problem, or is no answer to what was to be found out. A monologue that reasons from
evidence must fail them.

Every problem gets a partner, another problem of the same family where the family has two or more, by a derangement drawn from
the seed.

    wrong-picture     the answerer sees the partner's picture and is asked what the questioner asks.
    random-questions  the answerer sees its own picture, but in place of the questioner's k-th question it is asked the k-th look-up of
                      the partner's oracle monologue: a valid question, drawn at random among those of the family.
    shuffle-answers   the answerer sees the partner's picture, and in place of the questioner's k-th question it is asked the
                      k-th look-up of the partner's own oracle monologue (k modulo their number). So the questioner hears
                      replies of the kind that it expects, from an answerer at work on another problem, but independent of
                      its own picture and of what it asked.

An oracle in the answerer's seat recites the partner's replies where the picture is the partner's. Spans record what each policy really saw
and heard; the episode's ``extra`` names the control and the partner.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from monologue.graphs.state import GraphError, same_question
from monologue.tasks.base import Problem

CONTROLS = ("random-questions", "shuffle-answers", "wrong-picture")


def partners(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """Another problem for each problem's id; nobody is their own partner. Raises GraphError for fewer than two problems."""
    if len(problems) < 2 or len({problem.id for problem in problems}) < len(problems):
        raise GraphError(f"a control needs two or more different problems to exchange pictures among, got {len(problems)}")
    rng = random.Random(f"partners/{seed}")
    families: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        families[problem.family].append(problem)
    rings = [ring for ring in families.values() if len(ring) > 1]
    alone = [ring[0] for ring in families.values() if len(ring) == 1]
    if len(alone) == 1:
        rings[0].extend(alone)
    elif alone:
        rings.append(alone)
    found: dict[str, Problem] = {}
    for ring in rings:
        rng.shuffle(ring)
        found |= {problem.id: ring[index - 1] for index, problem in enumerate(ring)}
    return found


def shown(control: str | None, problem: Problem, partner: Problem | None) -> Problem:
    """Whose picture the answerer sees."""
    return problem if partner is None or control == "random-questions" else partner


def other_questions(control: str | None, partner: Problem | None) -> Callable[[int, str], str]:
    """What the answerer is asked in place of the questioner's question."""
    if control not in ("random-questions", "shuffle-answers") or partner is None:
        return same_question
    if not partner.oracle:
        raise GraphError(f"{control} asks the partner's own look-ups, but problem {partner.id!r} has no oracle; use wrong-picture")
    turns = partner.oracle
    return lambda look, question: turns[look % len(turns)].question
