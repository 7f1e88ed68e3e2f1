"""What is settled is not searched, and given back however it ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from monologue.backends.garbage import settled


class Knot:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.self = self


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_is_there_is_left_alone_and_given_back() -> None:
    with settled():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), settled():
        raise KeyError("any")
    assert gc.get_freeze_count() == 0


def test_garbage_is_freed_whether_made_before_or_within() -> None:
    before = weakref.ref(Knot())
    kept = Knot()
    old = weakref.ref(kept)
    with settled():
        assert before() is None
        new = weakref.ref(Knot())
        del kept
        gc.collect()
        assert new() is None and old() is not None
    gc.collect()
    assert old() is None


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()  # what is frozen and then dropped by another thread is no longer counted
    with settled(), settled():
        assert count // 2 < gc.get_freeze_count() <= count
    assert count // 2 < gc.get_freeze_count() <= count
