"""Features that a text model adds to its visual tokens behind the first layers: they must follow the cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mllm_squeeze.upstream import injections
from mllm_squeeze.upstream.injections import AddFeatures

Kept = tuple[Tensor, Tensor | None]


def has_deepstack(decoder: nn.Module) -> bool:
    """True where the text model adds deepstack features (Qwen3-VL and its kin)."""
    return injections.takes_deepstack(decoder)


def follow_cuts(decoder: nn.Module, kept: Callable[[], Kept | None]) -> Callable[[], None]:
    """Make the deepstack addition of one text model follow the cuts; returns what takes it off again.

    kept: returns (index int64 (B, M), valid bool (B, M) or None), the columns still there, or None without a cut.
    """

    def wrap(original: AddFeatures) -> AddFeatures:
        def add(hidden: Tensor, visual: Tensor, embeds: Tensor) -> Tensor:
            now = kept()
            return original(hidden, visual, embeds) if now is None else add_features(hidden, visual, embeds, *now)

        return add

    return injections.replace_deepstack(decoder, wrap)


def add_features(hidden: Tensor, visual: Tensor, embeds: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """Add to each visual survivor the feature it would have had.

    hidden: (B, M, D). visual: bool (B, T). embeds: (number of True in visual, D), in row-major order.
    """
    visual, index = visual.to(hidden.device), index.to(hidden.device)
    number = (visual.flatten().cumsum(0) - 1).clamp(min=0).view_as(visual)
    mine = visual.gather(1, index)
    if valid is not None:
        mine = mine & valid.to(hidden.device)
    rows = embeds.to(hidden.device, hidden.dtype)[number.gather(1, index)]
    return hidden + torch.where(mine.unsqueeze(-1), rows, 0)
