"""Scores and choices are made in float32, without gradients and outside autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def selection(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate an op whose result only chooses tokens: no gradients, no autocast; its first argument is a tensor."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def at_least_float32(x: Tensor) -> Tensor:
    """Return x as float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def on_device(values: Sequence[Any] | Tensor, like: Tensor) -> Tensor:
    """Return host numbers, int64 unless they are a tensor, on the device of `like`, without waiting for it."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    return host.to(like.device, non_blocking=True)
