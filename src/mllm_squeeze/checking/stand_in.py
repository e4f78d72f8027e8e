"""A small text model of the same class with random weights, to try what a model does without its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.shrink import VOCABULARY, shrink

__all__ = ["VOCABULARY", "StandIn", "stand_in"]

_MOST_BYTES = 3 * 2**29


@dataclass(frozen=True)
class StandIn:
    """A text model in float32 on the CPU, and what was made smaller in it, in words."""

    decoder: nn.Module
    shrunk: tuple[str, ...]


def stand_in(decoder: nn.Module, narrow: bool) -> StandIn:
    """Return a small text model of the class of one that may have no weights (meta device).

    Every kind of layer is kept, and who borrows keys and values of whom. narrow: shrink the width too, head size aside.

    Raises:
        UnsupportedModelError: it would still take more than 1.5 GiB. Whatever the class raises that cannot be built so.
    """
    config, shrunk = shrink(decoder.config, narrow)
    with torch.device("meta"):
        empty: nn.Module = type(decoder)(config)
    size = 4 * sum(weight.numel() for weight in empty.parameters())
    if size > _MOST_BYTES:
        raise UnsupportedModelError(
            f"its text model takes {size / 2**30:.1f} GiB in float32, even with few layers; load its weights instead"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small: nn.Module = type(decoder)(config).float().eval()
    return StandIn(small, shrunk)
