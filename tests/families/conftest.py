"""Collects which cells of docs/families.md the tests have proved.

A test says by the fixture `covers` what it proves; with SQUEEZE_FAMILY_RESULTS=FILE the run writes them as JSON, from
which `python docs/make_families.py FILE` makes the page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from mllm_squeeze.family.table import TABLE

_KEY = "proves"
_results: dict[str, dict[str, dict[str, Any]]] = {}


@pytest.fixture
def covers(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return the function by which a test says that it proves columns of a family's row, or that they are refused."""

    def say(family: str, *columns: str | None, refused: str = "") -> None:
        for column in columns:
            if column:
                request.node.user_properties.append((_KEY, [row_of(family), column, refused]))

    return say


def row_of(family: str) -> str:
    """Return the name of the row that a tiny model stands for: its model_type, with its tower where that has a row."""
    config = tiny.load(family).model.config
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    both = f"{config.model_type}+{tower}"
    name = both if both in TABLE else config.model_type
    assert name in TABLE
    return name


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what passed and what failed."""
    if report.when != "call":
        return
    for key, value in report.user_properties:
        if key == _KEY:
            family, column, refused = value
            cell = _results.setdefault(family, {}).setdefault(column, {"passed": 0, "failed": 0, "refused": ""})
            if refused and report.passed:
                cell["refused"] = refused
            else:
                cell["passed" if report.passed else "failed"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results where the environment asks for them."""
    target = os.environ.get("SQUEEZE_FAMILY_RESULTS")
    if target and not hasattr(session.config, "workerinput"):
        Path(target).write_text(json.dumps(_results, indent=1, sort_keys=True) + "\n")
