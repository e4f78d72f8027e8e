"""The centres of clusters found by density."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class DensityPeaks(Select):
    """Pick the centres of density-peak clusters, as many as each group may keep; it reads no score.

    by: the vectors that are clustered, see `mllm_squeeze.parts.vectors`.
    neighbours: how many nearest tokens a density looks at, itself included; None takes as many as clusters.
    """

    main: ClassVar[str | None] = "neighbours"

    by: Vectors = "features"
    neighbours: int | None = Field(default=None, ge=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the centres."""
        x = tokens[need_of(self.by)]

        def pick(rows: Rows) -> Tensor:
            joined = ops.density_peaks(rows.take(x), rows.mask, rows.limit, self.neighbours)
            return rows.mask & (joined == ops.positions(joined)) & (rows.limit > 0)[:, None]

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
