"""monologue: reasoning graphs that can be trained. The graph is the policy, the trace is the dataset.

The rooms (``agents``, ``graphs``, ``backends``, ``training``, ``traces``, ``tasks``) lie beside this folder in a checkout and inside
it in a wheel. The lines below make ``monologue.traces`` mean the same folder in both, and never make ``traces`` importable by itself.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "graphs" / "__init__.py").is_file():
    __path__.append(str(_root))
