"""monologue: reasoning graphs that can be trained. The graph is the policy, the trace is the dataset.

The rooms (``agents``, ``graphs``, ``backends``, ``training``, ``traces``, ``tasks``) lie beside this folder in a checkout and inside
it in a wheel. The lines below make ``monologue.traces`` mean the same folder in both, and never make ``traces`` importable by itself.

Public names load when they are first used, so ``import monologue`` costs neither torch nor langgraph.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from monologue.version import __version__

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "graphs" / "__init__.py").is_file():
    __path__.append(str(_root))

if _TYPE_CHECKING:
    from monologue.agents.load import load_policy, seat
    from monologue.agents.messages import Conclude, Look, Message, Reply
    from monologue.agents.policy import Policy
    from monologue.backends.base import Sampling
    from monologue.backends.scripted import ScriptedBackend
    from monologue.graphs.nodes import Step, policy_node
    from monologue.graphs.play import aplay, play
    from monologue.graphs.registry import Graph, find
    from monologue.graphs.state import Context, State
    from monologue.proof import verify
    from monologue.rollouts import reinforce
    from monologue.seating import starter
    from monologue.tasks.base import Problem
    from monologue.tasks.shapes import Looks, Shapes
    from monologue.traces.store import RunReader
    from monologue.training.dataset import as_dataset
    from monologue.training.imitate import imitate
    from monologue.training.rows import read_rows, solved

_PLACES = {
    "agents.load": ("load_policy", "seat"),
    "agents.messages": ("Conclude", "Look", "Message", "Reply"),
    "agents.policy": ("Policy",),
    "backends.base": ("Sampling",),
    "backends.scripted": ("ScriptedBackend",),
    "graphs.nodes": ("Step", "policy_node"),
    "graphs.play": ("aplay", "play"),
    "graphs.registry": ("Graph", "find"),
    "graphs.state": ("Context", "State"),
    "proof": ("verify",),
    "rollouts": ("reinforce",),
    "seating": ("starter",),
    "tasks.base": ("Problem",),
    "tasks.shapes": ("Looks", "Shapes"),
    "traces.store": ("RunReader",),
    "training.dataset": ("as_dataset",),
    "training.imitate": ("imitate",),
    "training.rows": ("read_rows", "solved"),
}
_HOMES = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "Conclude",
    "Context",
    "Graph",
    "Look",
    "Looks",
    "Message",
    "Policy",
    "Problem",
    "Reply",
    "RunReader",
    "Sampling",
    "ScriptedBackend",
    "Shapes",
    "State",
    "Step",
    "__version__",
    "aplay",
    "as_dataset",
    "find",
    "imitate",
    "load_policy",
    "play",
    "policy_node",
    "read_rows",
    "reinforce",
    "seat",
    "solved",
    "starter",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'monologue' has no attribute {name!r}")
    return getattr(_import_module(f"monologue.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
