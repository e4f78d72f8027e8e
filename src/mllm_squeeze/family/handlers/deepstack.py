"""Features that a text model adds to its visual tokens behind the first layers: they must follow the cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Kept = tuple[Tensor, Tensor | None]


def has_deepstack(decoder: nn.Module) -> bool:
    """True where the text model adds deepstack features (Qwen3-VL and its kin)."""
    return hasattr(decoder, "_deepstack_process")


def follow_cuts(decoder: nn.Module, kept: Callable[[], Kept | None]) -> Callable[[], None]:
    """Make the deepstack addition of one text model follow the cuts; returns what takes it off again.

    kept: returns (index int64 (B, M), valid bool (B, M) or None), the columns still there, or None without a cut.
    """
    original: Any = decoder._deepstack_process

    def process(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        now = kept()
        if now is None:
            added: Tensor = original(hidden_states, visual_pos_masks, visual_embeds)
            return added
        return add_features(hidden_states, visual_pos_masks, visual_embeds, *now)

    decoder.__dict__["_deepstack_process"] = process

    def undo() -> None:
        del decoder.__dict__["_deepstack_process"]

    return undo


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
