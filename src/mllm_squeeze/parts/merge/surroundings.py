"""Survivors that stand out little take up what lies around them."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.reducers.base import Mix, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import EncoderStates, Need

if TYPE_CHECKING:
    from torch import Tensor


class Surroundings(Merge):
    """Add to each survivor of small score the tokens near it on the grid, weighted by likeness and nearness.

    Of all tokens of its group and frame, another counts cosine * (1 - distance / radius), negative factors as 0, and
    these weights add up to 1. Vectors are the mean of encoder states over several blocks. Separators, groups of which
    all are kept, and survivors of larger score stay as they are. arXiv 2602.02951.

    quantile: the share of the survivors of a group, those of smallest score, that take up others.
    radius: a fraction of the longer side of the tile.
    itself: "added" gives the survivor the weight 1 whatever its part of the sum is, "mean" leaves it that part.
    blocks: of the encoder whose output states are averaged, as fractions of its depth.

    Raises:
        UnsupportedInputError: the grid is not known.
    """

    main: ClassVar[str | None] = "quantile"

    quantile: float = Field(default=0.55, ge=0, le=1)
    radius: float = Field(default=0.7, gt=0)
    itself: Literal["added", "mean"] = "added"
    blocks: tuple[float, ...] = Field(
        default=(0.625, 0.667, 0.709, 0.75, 0.792, 0.834, 0.875, 0.917, 0.959), min_length=1
    )

    def needs(self) -> tuple[Need, ...]:
        """Return the states of the blocks."""
        return tuple(EncoderStates(block=block) for block in self.blocks)

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return what goes into the survivors."""
        label, weight = self._pieces(tokens, groups, score)
        x = functools.reduce(operator.add, (tokens[need].float() for need in self.needs())) / len(self.blocks)
        weak = picks.keep & (label >= 0)
        (bar,) = ops.group_quantiles(weight, label.masked_fill(~weak, -1), groups.count, (self.quantile,))
        group = groups.label.clamp(min=0)
        whole = ops.segment_count(label.masked_fill(picks.keep, -1), groups.count) == 0
        weak = weak & (weight < bar.gather(1, group)) & ~whole.gather(1, group)
        slots = min(picks.keep.shape[1], max(tokens.counts))
        radius = self.radius * self._sides(tokens)
        entries = ops.surrounding_entries(
            x, tokens.grid, label, picks.keep, weak, radius, slots, self.itself == "added"
        )
        return Reduction(picks.keep, mix=Mix(*entries))

    def _pieces(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return int64 (S, N), the groups without separators, and float64 (S, N), the score with numbers only."""
        if not all(tokens.tiles):
            raise UnsupportedInputError(
                "What lies around a token is found on the grid of a picture, which is not known here. Write merge: "
                "nearest."
            )
        label = groups.label.masked_fill(tokens.grid[..., 2] < 0, -1)
        weight = groups.label.double() * 0 if score is None else score.detach().double()
        return label, weight.nan_to_num(neginf=0)

    def _sides(self, tokens: VisualTokens) -> Tensor:
        """Return float32 (S, N), the longer side of the tile of each token, in cells."""
        most = max(len(tiles) for tiles in tokens.tiles)
        rows = [[max(t.height, t.width) for t in tiles] + [1] * (most - len(tiles)) for tiles in tokens.tiles]
        return ops.take(ops.on_device(rows, tokens.mask), tokens.grid[..., 0].clamp(min=0)).float()
