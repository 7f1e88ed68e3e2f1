"""Tables on the terminal. What models and strangers wrote is shown without control characters and without markup."""

from __future__ import annotations

from collections.abc import Iterable


def clean(text: str) -> str:
    """Model text without control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def table(heads: list[str], rows: Iterable[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(*heads, box=box.SIMPLE_HEAD)
    for row in rows:
        grid.add_row(*(escape(clean(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(grid)
