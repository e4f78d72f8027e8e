"""One expectation of transformers that does not hold on the release that is installed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Broken:
    """What is relied on, in words: what it is, what was expected of it, and what was found instead."""

    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, found {self.found}"
