"""Tools beside ``look`` and ``conclude``: ordinary LangChain tools, called by name.

A call that the model got wrong (unknown tool, arguments that do not fit, a ``ToolException``) is answered in words, so that
it can be mended in the next turn. Any other exception is the tool's bug and propagates. ``calculator`` shows the form, and
how to execute model text safely: a parser of our own over ``ast`` nodes, no eval.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from monologue.agents.codec import Schema
from monologue.agents.messages import Region, ToolUse

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

OPERATIONS: Mapping[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
LONGEST = 200


class Toolbox:
    """The tools of a graph, by name."""

    def __init__(self, tools: Sequence[BaseTool] = ()) -> None:
        self._tools = {tool.name: tool for tool in tools}
        taken = {"look", "conclude"} & self._tools.keys()
        if taken or len(self._tools) != len(tools):
            raise ValueError(f"tools need names of their own, other than look and conclude; got {[tool.name for tool in tools]!r}")

    @property
    def schemas(self) -> tuple[Schema, ...]:
        """What a codec shows the policy."""
        if not self._tools:
            return ()
        from langchain_core.utils.function_calling import convert_to_openai_tool

        return tuple(convert_to_openai_tool(tool) for tool in self._tools.values())

    async def call(self, use: ToolUse) -> str:
        """The tool's result as text, or what was wrong with the call."""
        from langchain_core.tools import ToolException
        from pydantic import TypeAdapter, ValidationError

        tool = self._tools.get(use.name)
        if tool is None:
            return f"There is no tool {use.name!r}; there are: {', '.join(['look', 'conclude', *self._tools])}."
        try:
            TypeAdapter(tool.get_input_schema()).validate_python(use.arguments)
        except ValidationError as error:
            return f"The arguments do not fit {use.name!r}: {error.errors()[0]['msg']}."
        try:
            return str(await tool.ainvoke(use.arguments))
        except ToolException as error:
            return str(error)


def calculate(expression: str) -> float:
    """Value of an expression of numbers, + - * / // % and brackets. Raises ValueError on anything else."""
    if len(expression) > LONGEST:
        raise ValueError(f"expected an expression of at most {LONGEST} characters, got {len(expression)}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot calculate {expression!r}: {error}") from error
    if not math.isfinite(value):
        raise ValueError(f"cannot calculate {expression!r}: the result is not finite")
    return value


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError(f"expected numbers, + - * / // % and brackets, got {ast.unparse(node)!r}")


def calculator() -> BaseTool:
    """A calculator for the four operations, as a LangChain tool."""
    from langchain_core.tools import StructuredTool, ToolException

    def run(expression: str) -> str:
        try:
            return f"{calculate(expression):.12g}"
        except ValueError as error:
            raise ToolException(str(error)) from error

    return StructuredTool.from_function(run, name="calculator", description="Value of an arithmetic expression, e.g. 2 * (3 + 4).")


def enlarge(image: Image, region: Region, shortest: int = 224, longest: int = 1024) -> Image:
    """The region of a picture, scaled so that its shorter side has ``shortest`` pixels, or its longer side ``longest`` if
    that is less.
    """
    width, height = image.size
    left, top = int(region[0] * width), int(region[1] * height)
    right, bottom = max(left + 1, round(region[2] * width)), max(top + 1, round(region[3] * height))
    part = image.crop((left, top, right, bottom))
    scale = min(shortest / min(part.size), longest / max(part.size))
    return part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))))
