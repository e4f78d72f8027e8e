"""With `--deprecations=error`, using what transformers deprecates is an error: a rename shows a release early.

It warns in two ways, by Python's warnings and by its log; both count. Warnings are known by their words, since the
place that Python gives them is the caller's, often torch's.
"""

from __future__ import annotations

import logging
import re

import pytest

WORDS = r"deprecat|will be removed in"


class _Log(logging.Handler):
    """Raises what transformers only logs; logging lets an error of `emit` through to whoever logged."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if re.search(WORDS, message):
            raise FutureWarning(message)


def add_option(parser: pytest.Parser) -> None:
    """Add the option; `make newest` gives it."""
    choices = ("error", "warn")
    parser.addoption("--deprecations", choices=choices, default="warn", help="what transformers' deprecations are")


def configure(config: pytest.Config) -> None:
    """Put it into force where the option says so."""
    if config.getoption("--deprecations") == "error":
        for category in ("FutureWarning", "DeprecationWarning"):
            # The words may stand behind the first line; a filter must not hold another colon.
            config.addinivalue_line("filterwarnings", rf"error:[\s\S]*({WORDS}):{category}")
        # Python's own tooling, and torch's, in the libraries that we only use.
        config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch.*")
        logging.getLogger("transformers").addHandler(_Log())


def listen(config: pytest.Config) -> None:
    """Let warnings through to the log again, which the tiny models silence when they are imported."""
    if config.getoption("--deprecations") == "error":
        logging.getLogger("transformers").setLevel(logging.WARNING)
