"""What the taps of a pass shall read, and what they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.shorten import gather_rows
from mllm_squeeze.reducers.needs import Need


@dataclass(frozen=True)
class OneRow:
    """The row (B, 1) that an attention module shall project, of a sequence of some length."""

    row: Tensor
    length: int


@dataclass(frozen=True)
class SignalStore:
    """Signals of one pass.

    listeners: what reads a call, by attention module. one_row: attention modules that shall project one row only, while
    they are asked for a preview. read: what was read of each token, (B, M) or (B, M, D), by cut. row_weights: weights
    of the text rows that a step wants to read, by its number.
    """

    listeners: dict[nn.Module, Any] = field(default_factory=dict)
    one_row: dict[nn.Module, OneRow] = field(default_factory=dict)
    read: dict[tuple[PlannedCut, Need], Tensor] = field(default_factory=dict)
    row_weights: dict[int, Tensor] = field(default_factory=dict)

    def follow(self, order: Tensor) -> None:
        """Take the columns (B, M') that a cut left of what another cut at this layer still has to read."""
        self.read.update({key: _taken(value, order) for key, value in self.read.items()})

    def forget(self) -> None:
        """Let go of everything."""
        self.listeners.clear()
        self.one_row.clear()
        self.read.clear()
        self.row_weights.clear()


def _taken(values: Tensor, order: Tensor) -> Tensor:
    order = order.to(values.device)
    return values.gather(1, order) if values.ndim == 2 else gather_rows(values, order)
