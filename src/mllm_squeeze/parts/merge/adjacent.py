"""Neighbours in time that are alike become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Place

if TYPE_CHECKING:
    from torch import Tensor


def runs_of(label: Tensor, x: Tensor, sites: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> Tensor:
    """Return int64 (S, N), the first token of the run that each is joined to, itself where it is alone; -1 at padding.

    label: int64 (S, N), the row of each token. x: (S, N, d). sites: of (label, x) without gaps, bool, which of them are
    joined with the one behind. mask: bool (S, N).
    """
    # Neighbours are so whatever stands between them that is not to be chosen from.
    index, filled = ops.compact_indices(mask, mask.shape[1])
    found = sites(ops.take(label, index).masked_fill(~filled, -1), ops.take(x, index))
    first = ops.take(index, ops.joined_runs(found, filled).clamp(min=0))
    return ops.put_back(label.new_full(mask.shape, -1), index, filled, first)


class Adjacent(Merge):
    """Merge runs of neighbours in time: as many tokens as leave are joined with the one behind them, the most alike.

    Tokens that are joined hang together, so that a run of any length becomes one token, at the place of its first; the
    budget is met exactly. arXiv 2410.03007.

    by: the vectors that are compared by their cosine, see `mllm_squeeze.parts.vectors`.
    weights: "mean", or "score" for the mean weighted by the score of the step (negative numbers count as 0).
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"audio"})
    picks: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    weights: Literal["mean", "score"] = "mean"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return the first of each run, and what goes into it."""
        mask = groups.label >= 0
        number = (mask.sum(1) - limit[:, 0]).clamp(min=0)
        x = tokens[need_of(self.by)]
        assign = runs_of(
            groups.label, x, lambda label, vectors: self._sites(ops.adjacent_sites(vectors, label, number)), mask
        )
        keep = assign == ops.positions(assign)
        if self.weights == "mean" or score is None:
            return Reduction(keep, assign)
        weight = score.float().nan_to_num(0, neginf=0).clamp(min=0)
        share = ops.mean_weights(assign, weight)
        # A token that is by itself stays as it is, whatever its score.
        alone = ops.segment_count(assign, assign.shape[1]).gather(1, assign.clamp(min=0)) == 1
        return Reduction(keep, assign, share.masked_fill(alone & keep, 1))

    def _sites(self, sites: Tensor) -> Tensor:
        return sites


class AdjacentPairs(Adjacent):
    """Merge pairs of neighbours in time: as `adjacent`, but a token takes part in one merge only.

    Where several in a row are joined every other one is, from the first on, so that more tokens stay than are asked
    for. arXiv 2306.16009.

    by: the vectors that are compared by their cosine, see `mllm_squeeze.parts.vectors`.
    weights: "mean", or "score" for the mean weighted by the score of the step (negative numbers count as 0).
    """

    known_count: ClassVar[bool] = False
    why_more: ClassVar[str | None] = "a token takes part in one merge, and those most alike stand in a row"

    def _sites(self, sites: Tensor) -> Tensor:
        return ops.every_other_site(sites)
