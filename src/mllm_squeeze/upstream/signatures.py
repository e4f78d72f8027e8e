"""The names of the arguments that forwards and methods take, found once per class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, `self` aside."""
    return method_parameters(type(module).forward)


@lru_cache(maxsize=512)
def method_parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments of a method as its class has it, `self` aside."""
    return tuple(inspect.signature(method).parameters)[1:]


@lru_cache(maxsize=512)
def places(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments that a method also takes by their place, `self` aside."""
    found = inspect.signature(method).parameters.values()
    return tuple(one.name for one in found if one.kind is one.POSITIONAL_OR_KEYWORD)[1:]
