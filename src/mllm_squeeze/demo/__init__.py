"""A tiny LLaVA trained from nothing on drawn pictures, with its pictures, its questions and its training script.

`folder()` is where the trained model lies, for `from_pretrained`; `held_out` and `accuracy` are the test for it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

_HOMES = {
    "Item": "questions",
    "Question": "questions",
    "Scene": "pictures",
    "Thing": "pictures",
    "accuracy": "evaluate",
    "answers": "evaluate",
    "ask": "questions",
    "draw": "pictures",
    "held_out": "questions",
    "prompt": "evaluate",
}
__all__ = [*sorted(_HOMES), "folder"]


def folder() -> Path:
    """The folder with the trained model and its processor."""
    return Path(__file__).parent / "model"


def __getattr__(name: str) -> Any:
    """Public names load with their module when first asked for, so that the pictures need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
