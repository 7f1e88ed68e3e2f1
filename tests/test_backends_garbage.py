"""What is settled is not searched, whatever is nested in it and however it ends."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from monologue.agents.codec import TinyCodec
from monologue.backends.garbage import settled
from monologue.backends.scripted import ScriptedBackend
from monologue.graphs.oracle import oracle
from monologue.graphs.play import play
from monologue.tasks.shapes import Shapes
from tests.tokens import tiny_tokenizer

EYES = ScriptedBackend([], tiny_tokenizer())


class Knot:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.self = self


def test_the_outermost_context_settles_and_gives_back() -> None:
    assert gc.get_freeze_count() == 0
    with settled():
        count = gc.get_freeze_count()
        assert count > 1000
        with settled():
            assert gc.get_freeze_count() == count
        assert gc.get_freeze_count() == count
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), settled():
        raise KeyError("any")
    assert gc.get_freeze_count() == 0


def test_garbage_made_meanwhile_is_collected_and_what_was_there_afterwards() -> None:
    before = Knot()
    old = weakref.ref(before)
    with settled():
        new = weakref.ref(Knot())
        del before
        gc.collect()
        assert new() is None and old() is not None
    gc.collect()
    assert old() is None


def test_a_play_is_settled_while_it_lasts(tmp_path: Path) -> None:
    seats, found = {role: oracle(TinyCodec(tiny_tokenizer()), EYES) for role in ("questioner", "answerer")}, list[int]()
    play("monologue", Shapes().problems("train", 2), seats, tmp_path, progress=False, ended=lambda _: found.append(gc.get_freeze_count()))
    assert len(found) == 2 and min(found) > 1000 and gc.get_freeze_count() == 0
