"""Graphs by name, each with the seats that it has and what an oracle says in them.

``find("monologue")`` is the graph with a learned stop, ``find("monologue:looks=2")`` asks two questions and then concludes,
as in IMMO. A builder's own graph is one more ``Graph``, given to ``play`` as it is or made known by ``register``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from monologue.agents.messages import Action
from monologue.graphs import blind, caption, direct, latent, monologue
from monologue.graphs.controls import CONTROLS
from monologue.graphs.state import GraphError

Script = Mapping[str, tuple[Action, ...]]
"""What each role says, in order."""


@dataclass(frozen=True)
class Graph:
    """A graph and what one must know to play it."""

    name: str
    """As it stands in traces."""
    roles: tuple[str, ...]
    """Seats that need a policy."""
    build: Callable[..., Any]
    """Gives the compiled LangGraph graph; options by keyword."""
    oracle: Callable[..., Script] | None = None
    """What perfect policies would say to a problem, given the options; None where nobody knows."""
    controls: tuple[str, ...] = ()
    """The controls that make sense in it."""
    options: Mapping[str, int] = field(default_factory=dict)
    """Keyword arguments for ``build``."""

    def compiled(self) -> Any:
        """The LangGraph graph: invoke, stream and draw it like any other."""
        return _compiled(self.build, tuple(sorted(self.options.items())))


@cache
def _compiled(build: Callable[..., Any], options: tuple[tuple[str, int], ...]) -> Any:
    return build(**dict(options))


_GRAPHS: dict[str, Graph] = {}


def register(graph: Graph) -> Graph:
    """Makes a graph known by its name. Raises GraphError where the name is taken."""
    if graph.name in _GRAPHS or ":" in graph.name:
        raise GraphError(f"graph names are unique and hold no colon; {graph.name!r} is taken or malformed")
    _GRAPHS[graph.name] = graph
    return graph


def names() -> tuple[str, ...]:
    return tuple(sorted(_GRAPHS))


def listed(names: str) -> list[str]:
    """The graphs named in one text, commas between them; a comma before ``key=number`` goes on with a graph's options."""
    return [name.strip() for name in re.split(r",(?![^,:]*=)", names)]


def find(name: str) -> Graph:
    """The graph called ``name``, options after a colon: ``name:key=number,key=number``. Raises GraphError."""
    base, _, tail = name.partition(":")
    if base not in _GRAPHS:
        raise GraphError(f"unknown graph {base!r}; choose from {', '.join(names())}")
    graph = _GRAPHS[base]
    if not tail:
        return graph
    try:
        options = {key: int(value) for key, value in (part.split("=") for part in tail.split(","))}
        found = Graph(name, graph.roles, graph.build, graph.oracle, graph.controls, options)
        found.compiled()
    except (ValueError, TypeError) as error:
        raise GraphError(f"expected {base}:key=number with options that {base!r} has, got {name!r} ({error})") from error
    return found


register(Graph("monologue", ("questioner", "answerer"), monologue.build, monologue.oracle, CONTROLS))
register(Graph("direct", ("answerer",), direct.build, direct.oracle, ("wrong-picture",)))
register(Graph("look", ("answerer",), direct.build_look, direct.oracle, ("wrong-picture",)))
register(Graph("caption", ("questioner", "answerer"), caption.build, caption.oracle, ("wrong-picture",)))
register(Graph("latent", ("thinker", "questioner", "answerer"), latent.build, latent.oracle, ("wrong-picture",)))
register(Graph("blind", ("questioner",), blind.build, blind.oracle))
