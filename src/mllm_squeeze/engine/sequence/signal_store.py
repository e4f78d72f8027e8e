"""What the taps of a pass shall read, and what they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class OneRow:
    """The row (B, 1) that an attention module shall project, of a sequence of some length."""

    row: Tensor
    length: int


@dataclass(frozen=True)
class SignalStore:
    """Signals of one pass.

    listeners: what reads a call, by attention module. one_row: attention modules that shall project one row only, while
    they are asked for a preview. read: what was read, by its source. row_weights: weights
    of the text rows that a step wants to read, by its number.
    """

    listeners: dict[nn.Module, Any] = field(default_factory=dict)
    one_row: dict[nn.Module, OneRow] = field(default_factory=dict)
    read: dict[Any, Any] = field(default_factory=dict)
    row_weights: dict[int, Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Let go of everything."""
        self.listeners.clear()
        self.one_row.clear()
        self.read.clear()
        self.row_weights.clear()
