"""What the encoder gave for the items of one modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mllm_squeeze.amount import Amount
from mllm_squeeze.engine.text_encoder import SharedSpace
from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.base import Reducer
from mllm_squeeze.reducers.needs import Need

# What a token carries that stands for no token of the encoder: it stays, or goes.
SEPARATOR, PRUNED = -1, -2


@dataclass(frozen=True)
class Features:
    """What the encoder gave for one modality: visual tokens and tiles per item, and signals per token of each item.

    lengths: None where the encoder does not tell; then each unbroken run of placeholders is an item.
    """

    modality: str
    lengths: tuple[int, ...] | None
    tiles: tuple[tuple[Tile, ...], ...] = ()
    signals: Mapping[Need, tuple[Tensor, ...]] = field(default_factory=dict)
    # Of a reduction inside the encoder, int64 (length,) per item: the encoder's token that each one carries, SEPARATOR
    # or PRUNED; the cut of those that carry the same happens before layer 0.
    groups: tuple[Tensor, ...] | None = None
    # The reducer that worked inside the encoder, and how much it left; None where none did.
    merged_by: tuple[Reducer, Amount] | None = None
    # The space of the user's text encoder, into which signals were projected.
    compared_by: SharedSpace | None = None

    def without(self, left: Tensor | None) -> Features:
        """Return the features that a family leaves itself of those it encoded; left: bool (sum of lengths,) or None.

        An item that lost some is no rectangle any more.
        """
        if left is None or self.lengths is None or bool(left.all()):
            return self
        rows = torch.split(left.cpu().bool(), list(self.lengths))
        return replace(
            self,
            lengths=tuple(int(row.sum()) for row in rows),
            tiles=tuple(tiles if bool(row.all()) else () for tiles, row in zip(self.tiles, rows, strict=True)),
            signals={need: _taken(values, rows) for need, values in self.signals.items()},
            groups=None if self.groups is None else _taken(self.groups, rows),
        )


def _taken(values: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value[row.to(value.device)] for value, row in zip(values, rows, strict=True))
