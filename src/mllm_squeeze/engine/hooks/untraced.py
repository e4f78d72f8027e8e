"""Keeps torch.compile out of functions of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a function: a prefill chooses by content, so its graph would break at each choice."""
    hidden = cast("Callable[P, R]", torch.compiler.disable(function))

    # What `disable` returns costs tens of microseconds per call, and each layer of each step makes some.
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return hidden(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call
