"""Tokens at which the words look, all together or one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Groups, Part, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Attention, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class LookedAt(Select):
    """Pick the tokens at which the words look, all together or one of them, in the layer before the cut.

    A token is dropped whose attention, mean over heads, summed over the words is a smaller part of that of all tokens
    than `together`, and whose largest attention from one word is below `alone`. Some are protected, and the best one
    always stays. A budget that the step asks for takes the protected first and then those of largest sum.
    arXiv 2411.10803.

    together: the part of the sum over all tokens.
    alone: the attention of one word.
    protect: the score by which tokens are protected, None for none.
    protected: their share of the tokens of the span before any cut, rounded up.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    places: ClassVar[frozenset[Place]] = frozenset({"layer"})

    together: float = Field(default=0.001, ge=0)
    alone: float = Field(default=0.001, ge=0)
    protect: AScore | None = None
    protected: float = Field(default=0.08, ge=0, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the attention of the words, summed and at most."""
        return Attention(rows="text", over_rows="sum"), Attention(rows="text", over_rows="max")

    def inside(self) -> tuple[Part, ...]:
        """Return the score of what is protected."""
        return () if self.protect is None else (self.protect,)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        mask = groups.label >= 0
        total, most = (tokens[need] for need in self.needs())
        safe = self._safe(tokens, groups, mask)
        if tokens.asked:
            first = safe.long() * mask.shape[1] - ops.ranks(total, mask)
            return Picks(ops.top_k_mask(first.double(), mask, limit[:, 0]).long() - 1)
        bar = self.together * total.masked_fill(~mask, 0).sum(1, keepdim=True)
        keep = mask & (safe | (total >= bar) | (most >= self.alone))
        keep = keep | ops.top_k_mask(total, mask & ~keep.any(1, keepdim=True), 1)
        return Picks(keep.long() - 1)

    def _safe(self, tokens: VisualTokens, groups: Groups, mask: Tensor) -> Tensor:
        if self.protect is None:
            return mask & False
        number = ops.on_device([-(-round(n * self.protected * 10**6) // 10**6) for n in tokens.lengths], mask)
        return ops.top_k_mask(self.protect.score(tokens, groups), mask, number)
