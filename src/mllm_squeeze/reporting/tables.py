"""Tables of a report: as plain text, and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 80


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> Table:
    """Return a table without lines, columns two blanks apart.

    left: numbers of the columns that hold words; these are flush left, and folded where it gets narrow. The others are
    flush right.
    """
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, header in enumerate(headers):
        words = number in left
        found.add_column(
            Text(header),
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
        )
    for row in rows:
        found.add_row(*map(Text, row))
    return found


def plain(shown: Table) -> str:
    """Return a table as text of at most 80 columns, without colours and without blanks at the ends of lines."""
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, color_system=None, force_terminal=False).print(shown)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table: the first column flush left, the others right."""
    bar = ["---", *["---:"] * (len(headers) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (headers, bar, *rows)]
