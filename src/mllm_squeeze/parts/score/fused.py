"""Several scores as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Groups, Part, Score, Written
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

Scale = Literal["none", "minmax", "zscore", "softmax", "share", "rank", "unit"]


class Term(Written):
    """One of the scores.

    score: the score.
    weight: what it counts; the exponent in a product.
    sign: -1 turns it round before it is normalised.
    normalise: the scale that it is brought to, span by span: "minmax" to [0, 1], "zscore" to mean 0 and deviation 1,
        "softmax" and "share" to a sum of 1, "share" by division, "rank" to 1 for the best and 1 / n for the last,
        "unit" to the Euclidean length 1.
    """

    score: AScore
    weight: float = Field(default=1.0, ge=0)
    sign: Literal[1, -1] = 1
    normalise: Scale = "none"


class Fused(Score):
    """Score a token by several scores together.

    of: the scores, each with its weight, sign and scale.
    how: "sum" adds weight * score, "product" multiplies score ** weight (negative numbers count as 0), "rank" adds the
        weighted ranks, "steady" adds weight * score / variance over the span, so that a score that varies less counts
        more.
    per: whether a score is brought to its scale over the span, or in each group of the step by itself.
    """

    main: ClassVar[str | None] = "of"

    of: tuple[Term, ...]
    how: Literal["sum", "product", "rank", "steady"] = "sum"
    per: Literal["span", "group"] = "span"

    @model_validator(mode="after")
    def _several(self) -> Fused:
        if not self.of:
            raise ValueError("of is a list of at least one {score: ...}; got none")
        return self

    def inside(self) -> tuple[Part, ...]:
        """Return the scores."""
        return tuple(term.score for term in self.of)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the fused score, -inf where one of them is -inf."""
        import torch

        there = groups.label >= 0
        scores = []
        for term in self.of:
            score = term.score.score(tokens, groups)
            # -inf says that a token is no piece of the picture, whatever the sign.
            score = score if term.sign == 1 else (-score).masked_fill(score == -torch.inf, -torch.inf)
            scores.append(self._scaled(score, there, groups, "rank" if self.how == "rank" else term.normalise))
        how = "product" if self.how == "product" else "sum"
        stacked = torch.stack(scores)
        stacked = ops.steadied(stacked, there) if self.how == "steady" else stacked
        return ops.fused(stacked, [term.weight for term in self.of], how)

    def _scaled(self, score: Tensor, there: Tensor, groups: Groups, scale: Scale) -> Tensor:
        """Return a score on a scale of the span, or of each group."""
        if self.per == "span" or groups.count == 1:
            return ops.normalised(score, there, scale)
        slots = min(groups.widest or score.shape[1], score.shape[1])
        index, filled = ops.group_rows(groups.label, groups.count, slots)
        rows = ops.take(score, index).reshape(-1, slots)
        scaled = ops.normalised(rows, filled.reshape(-1, slots), scale).reshape(index.shape)
        return ops.put_back(score.float().masked_fill(there, 0), index, filled, scaled)
