"""What lives as long as the process is not searched for garbage again and again.

Python's collector follows every object that can hold others, and torch and transformers leave about a million of them: a third of a second
each time, while all episodes wait. Playing makes enough short-lived objects to set it off every few seconds, a tenth of the time of a play
or of an iteration (docs/log.md, 2026-11-22). Servers such as vLLM and SGLang put what is there when they start out of its sight; so do
plays and trainings here, and give it back at their end.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock, _inside = threading.Lock(), [0]


@contextmanager
def settled() -> Iterator[None]:
    """Whatever exists now is left alone by the garbage collector until the outermost of these contexts ends; what is made within them is
    collected as ever.
    """
    with _lock:
        _inside[0] += 1
        if _inside[0] == 1:
            gc.freeze()
    try:
        yield
    finally:
        with _lock:
            _inside[0] -= 1
            if not _inside[0]:
                gc.unfreeze()
