"""Tokens whose vectors span the most: the greedy determinantal point process."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows, worth
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Dpp(Select):
    """Pick tokens greedily for the largest determinant of their kernel quality * cosine * quality, group by group.

    arXiv 1709.05135.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    quality: "score" takes the score of the step (negative numbers count as 0; where nothing else is left all count
        alike), "none" lets all count alike.
    """

    main: ClassVar[str | None] = "quality"

    by: Vectors = "features"
    quality: Literal["score", "none"] = "score"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the tokens picked in each group."""
        x = tokens[need_of(self.by)]
        quality = None if score is None or self.quality == "none" else worth(score)

        def pick(rows: Rows) -> Tensor:
            own = None if quality is None else rows.take(quality)
            return ops.dpp_map(rows.take(x), rows.mask, rows.limit, rows.steps, own)

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
