"""Hidden states that come as several streams (streams, B, T, D), seen as one wide stream (B, T, streams * D)."""

from __future__ import annotations

from torch import Tensor


def fold(hidden: Tensor) -> Tensor:
    """Return (B, T, streams * D) of stacked streams; a single stream (B, T, D) as it is."""
    return hidden if hidden.ndim == 3 else hidden.permute(1, 2, 0, 3).flatten(2)


def unfold(hidden: Tensor, like: Tensor) -> Tensor:
    """Undo `fold`; like: hidden states in the form that the layer expects."""
    if like.ndim == 3:
        return hidden
    return hidden.unflatten(2, (like.shape[0], like.shape[3])).permute(2, 0, 1, 3)
