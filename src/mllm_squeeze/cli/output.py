"""How the commands print: tables and text for people, JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def console(*, error: bool = False) -> Console:
    """Return the console of this moment; one made at import would hold on to a stream that tests replace."""
    return Console(stderr=error)


def fail(error: Exception) -> None:
    """Print an error as one red message, on the error stream."""
    screen = console(error=True)
    screen.print(Text("Error: ", style="bold red") + Text(str(error), style="red"), soft_wrap=True)


def as_json(data: Any) -> None:
    """Print data as JSON and nothing else."""
    print(json.dumps(data, indent=2, default=str))


def pairs(data: Mapping[str, Any]) -> None:
    """Print names and values, one a line."""
    table = Table.grid(padding=(0, 2))
    for name, value in data.items():
        table.add_row(Text(name, style="bold"), Text(words(value)))
    console().print(table)


def words(value: Any) -> str:
    """Return a value as a person would say it."""
    if value in (None, "", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield what is told each step of long work: it moves in a terminal, and is a line with the seconds elsewhere.

    On the error stream, so that the answer can be piped.
    """
    screen, begin = console(error=True), time.perf_counter()
    if screen.is_terminal:
        with screen.status("starting") as status:
            yield status.update
    else:
        yield lambda text: screen.print(
            f"{time.perf_counter() - begin:6.1f} s  {text}", markup=False, highlight=False, soft_wrap=True
        )


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something takes its time, on the error stream so that the answer can be piped."""
    with console(error=True).status(what):
        yield
