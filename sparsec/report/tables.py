"""Tables that stay readable on any terminal: side by side where they fit, one record below the other where not.

This file decides the form. It must not know what the cells say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


class Column(NamedTuple):
    """A column's title, and on which side its cells stand."""

    title: str
    justify: Literal["left", "right"] = "left"


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], console: Console, title: str | None = None
) -> RenderableType:
    """Rows under titles, or each row as a short list of `title value` lines where the console is too narrow."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column.title, justify=column.justify, no_wrap=True)
    for row in rows:
        made.add_row(*row)
    if Measurement.get(console, console.options.update(width=10_000), made).maximum <= console.width:
        return made
    return _records(columns, rows, title)


def _records(columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], title: str | None) -> RenderableType:
    parts: list[RenderableType] = [Text(title, "bold")] if title else []
    for first, *others in rows:
        facts = Table.grid(padding=(0, 2, 0, 0))
        for column, cell in zip(columns[1:], others, strict=True):
            facts.add_row(Text(column.title, "dim"), cell)
        heading = Text(first, "bold") if isinstance(first, str) else first
        parts += [heading, Padding(facts, (0, 0, 1, 2))]
    return Group(*parts)
