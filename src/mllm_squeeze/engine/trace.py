"""What a pass did: its cuts, and what each of them cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from mllm_squeeze.engine.plan import PlannedCut


@dataclass(frozen=True)
class Cut:
    """One cut of the last prefill: from `layer` on, the model sees only the kept columns.

    layer: zero-based. index: int64 (B, M), columns of the padded prompt. valid: bool (B, M) or None, False where a
    shorter row is padded.
    """

    layer: int
    index: Tensor
    valid: Tensor | None = None

    @cached_property
    def kept(self) -> list[Tensor]:
        """Ascending columns of the padded prompt that each sample keeps, text included, padding not; on the CPU."""
        index = self.index.cpu()
        if self.valid is None:
            return list(index)
        return [row[good] for row, good in zip(index, self.valid.cpu(), strict=True)]


@dataclass(frozen=True)
class Attended:
    """Keys that are attended to from outside, in one pass; counts are columns per row, padding included.

    layers: decoder layers that attend to them, () for the queries of a Q-Former. tokens: length of the prompt. before,
    after: keys of this pass. held_before, held_after: keys of earlier turns, without and with the method.
    """

    layers: tuple[int, ...]
    tokens: int
    before: int
    after: int
    held_before: int = 0
    held_after: int = 0


@dataclass(frozen=True)
class StageTrace:
    """What one cut did: tokens per span before and after, sequence length before and after, and its own time.

    asked: tokens each span was asked to keep, None where the rule decided.
    """

    cut: PlannedCut
    layer: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    asked: tuple[int, ...] | None
    sequence_before: int
    sequence_after: int
    clock: tuple[Any, Any]

    @property
    def seconds(self) -> float:
        """Time the rule took; on a GPU this waits for it to be known."""
        start, end = self.clock
        if isinstance(start, float):
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
