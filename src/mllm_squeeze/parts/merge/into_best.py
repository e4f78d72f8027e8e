"""The best tokens take in those of the second best that are most like them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class IntoBest(Merge):
    """Take half as many again by score, then merge those of the worse half that are most like one of the better half.

    arXiv 2503.10501. Of n tokens to keep, n + floor(n / 2) candidates are taken by score and the others dropped; the
    candidates of the worse half with the largest cosine go into their most similar token of the better half, as a plain
    mean, until n are left.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    picks: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    main: ClassVar[str | None] = "by"

    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return the best candidates, and what goes into them."""
        mask = groups.label >= 0
        score = mask.float() if score is None else score
        return Reduction(*ops.merged_into_best(tokens[need_of(self.by)], score, mask, limit[:, 0]))
