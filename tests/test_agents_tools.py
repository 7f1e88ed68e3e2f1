"""The toolbox and its calculator: the model's mistakes are answered in words, bugs propagate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.tools import StructuredTool
from PIL import Image

from monologue.agents.messages import ToolUse
from monologue.agents.tools import Toolbox, calculate, calculator, enlarge


@given(st.integers(-99, 99), st.integers(-99, 99), st.integers(1, 99))
def test_the_calculator_agrees_with_python(a: int, b: int, c: int) -> None:
    assert calculate(f"({a} + {b}) * -{c} / {c} - {b} % {c}") == (a + b) * -c / c - b % c


@pytest.mark.parametrize("text", ["__import__('os')", "a", "2 ** 9", "1 / 0", "(1).real", "[1]", "'a' * 9", "1e308 * 10", "1" * 300, ""])
def test_the_calculator_refuses_everything_but_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot calculate|expected"):
        calculate(text)


async def test_a_models_mistakes_in_a_call_are_answered_in_words() -> None:
    box = Toolbox([calculator()])
    assert await box.call(ToolUse("calculator", {"expression": "2 * 3"})) == "6"
    assert "cannot calculate" in await box.call(ToolUse("calculator", {"expression": "2 *"}))
    assert "do not fit" in await box.call(ToolUse("calculator", {"sum": 1}))
    assert "no tool 'oracle'" in await box.call(ToolUse("oracle"))


async def test_a_bug_inside_a_tool_propagates() -> None:
    def broken(text: str) -> str:
        """Breaks."""
        raise KeyError(text)

    with pytest.raises(KeyError):
        await Toolbox([StructuredTool.from_function(broken)]).call(ToolUse("broken", {"text": "x"}))


def test_a_tool_may_not_take_the_name_of_an_action() -> None:
    def look(text: str) -> str:
        """Looks."""
        return text

    with pytest.raises(ValueError, match="names of their own"):
        Toolbox([StructuredTool.from_function(look)])


@given(st.tuples(st.floats(0, 0.98), st.floats(0, 0.98), st.floats(0.01, 1), st.floats(0.01, 1)))
def test_an_enlarged_region_has_a_bounded_size(numbers: tuple[float, float, float, float]) -> None:
    left, top, wide, high = numbers
    part = enlarge(Image.new("RGB", (300, 20)), (left, top, min(1, left + wide), min(1, top + high)))
    assert min(part.size) >= 1 and max(part.size) <= 1024
