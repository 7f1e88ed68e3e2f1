"""What lives as long as a play or a training is not searched for garbage again and again.

Python's collector follows every object that can hold others, and torch and transformers leave about a million of them: a third of a second
each time, while everything waits. Playing makes enough short-lived objects to set it off every few iterations (docs/log.md, 2026-11-22:
a twentieth to a tenth of the time of small ones).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """Garbage is collected once; what is left is out of the collector's sight until the context ends, what is made within it is collected
    as ever. Where the process has frozen its objects already, nothing is done.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
