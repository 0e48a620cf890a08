"""One table, three faces: the terminal, JSON for machines, Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from rich.console import Console
from rich.table import Table as RichTable

__all__ = ["Table", "print_table", "to_markdown"]


@attrs.frozen
class Table:
    """A title, headings, and rows of text. The first column names the row, the others hold numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def print_table(table: Table, console: Console) -> None:
    """Draw the table in the terminal."""
    drawn = RichTable(title=table.title, title_justify="left")
    for column, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="left" if column == 0 else "right", no_wrap=column == 0)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)


def to_markdown(table: Table) -> str:
    """The table as Markdown, with its title as a heading of the third level."""
    lines = [
        f"### {table.title}",
        "",
        "| " + " | ".join(table.headings) + " |",
        "|---|" + "---:|" * (len(table.headings) - 1),
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    return "\n".join(lines) + "\n"
