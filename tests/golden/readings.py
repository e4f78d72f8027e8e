"""How each golden file is read: its names as signals of the library, and what came out under the names of the file.

A reading runs a method on a case with `squeeze.choose` and returns what it found by the names of the expected arrays.
Readings of more methods stand in the files beside this one, by the kind of method; READINGS collects them all.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from golden.case import Case

Reading = Callable[[Case], dict[str, Any]]
READINGS: dict[str, Reading] = {}


def reads(key: str) -> Callable[[Reading], Reading]:
    """Register the reading of the golden file of this name."""

    def register(reading: Reading) -> Reading:
        assert key not in READINGS, f"{key} is read twice"
        READINGS[key] = reading
        return reading

    return register


def load_all() -> dict[str, Reading]:
    """Return the readings of all methods."""
    for path in sorted(Path(__file__).parent.glob("read_*.py")):
        import_module(f"golden.{path.stem}")
    return READINGS
