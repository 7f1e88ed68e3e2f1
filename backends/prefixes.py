"""What an engine has read already: keys and values of streams that may go on, so that a turn costs its new ids and not all before them.

A stream (``Prompt.affinity``) leaves at the end of each call the cache of every id that was fed. The next call that begins with exactly
these ids, and shows no further picture, takes it up; any other reads from its beginning. A picture is known by its hash here, which is
taken at its word. Least recently used streams go first when the store is full. New weights empty it. Numbers differ from a whole reading
by rounding alone (1e-6 in float32), as batches do.

Shapes: H heads, L ids, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prefix:
    """A stream's beginning, read."""

    ids: tuple[int, ...]
    """What was fed."""
    pictures: tuple[str, ...]
    """Hashes of the pictures in it."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer, (H, L, D)."""


class Prefixes:
    """The store of one engine; holds ``most`` ids, none where that is 0."""

    def __init__(self, most: int) -> None:
        self.most, self._held = most, 0
        self._streams: OrderedDict[str, list[Prefix]] = OrderedDict()

    def find(self, affinity: str, ids: tuple[int, ...], pictures: tuple[str, ...]) -> Prefix | None:
        """The longest beginning of ``ids`` that is held, if it leaves at least one id to read."""
        found = [one for one in self._streams.get(affinity, ()) if len(one.ids) < len(ids) and one.pictures == pictures]
        fitting = [one for one in found if ids[: len(one.ids)] == one.ids]
        return max(fitting, key=lambda one: len(one.ids), default=None)

    def put(self, affinity: str, prefix: Prefix) -> None:
        """Keeps a stream's latest state; what it extends is dropped."""
        before = self._streams.pop(affinity, [])
        stream = [*(one for one in before if prefix.ids[: len(one.ids)] != one.ids), prefix]
        self._streams[affinity] = stream
        self._held += _size(stream) - _size(before)
        while self._held > self.most and self._streams:
            _, gone = self._streams.popitem(last=False)
            self._held -= _size(gone)

    def clear(self) -> None:
        self._streams.clear()
        self._held = 0


def _size(stream: list[Prefix]) -> int:
    return sum(len(one.ids) for one in stream)
