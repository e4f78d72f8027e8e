"""Collects which cells of docs/families.md the tests have proved.

A test says by the fixture `covers` what it proves; with SQUEEZE_FAMILY_RESULTS=FILE the run writes them as JSON, from
which `python docs/make_families.py` makes the page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import matrix
from mllm_squeeze.family.table import TABLE

_KEY = "proves"
_results: dict[str, dict[str, dict[str, Any]]] = {}


@pytest.fixture
def covers(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return the function by which a test says that it proves columns of a family's row, or that they are refused."""

    def say(family: str, *columns: str | None, refused: str = "") -> None:
        for column in columns:
            if column:
                request.node.user_properties.append((_KEY, [matrix.row_of(family).model_type, column, refused]))

    return say


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
    """Write the results where the environment asks for them; a family that this release cannot run keeps its last."""
    target = os.environ.get("SQUEEZE_FAMILY_RESULTS")
    if target and not hasattr(session.config, "workerinput"):
        path = Path(target)
        last = json.loads(path.read_text()) if path.exists() else {}
        results = {family: cells for family, cells in last.items() if family in TABLE} | _results
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
