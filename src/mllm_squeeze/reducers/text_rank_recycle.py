"""Keep what the relevant words look at, and recycle the best of the rest into cluster means: SparseVLM."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Facts, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Attention, Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


def keep_and_recycle(
    scores: Tensor, features: Tensor, mask: Tensor, split: list[tuple[int, int, int]]
) -> tuple[Tensor, Tensor | None]:
    """Return (keep, assign): the best tokens stay, the best of the others are clustered, each cluster at its centre.

    scores, mask: (S, N). features: (S, N, D). split: (kept, candidates, clusters) of each span, on the host. assign is
    None where no span has clusters.
    """
    kept, candidates, clusters = ops.on_device(split, scores).unbind(1)
    keep = ops.top_k_mask(scores, mask, kept)
    slots = max(s[1] for s in split)
    if slots == 0:
        return keep, None
    second = ops.top_k_mask(scores, mask & ~keep, candidates)
    index, filled = ops.compact_indices(second, slots)
    joined = ops.density_peaks(ops.take(features, index), filled, clusters)
    itself = ops.positions(scores)
    assign = itself.masked_fill(~keep, -1)
    assign = ops.put_back(assign, index, filled, ops.take(index, joined.clamp(min=0)))
    return assign == itself, assign


class TextRankRecycle(Reducer):
    """Rank visual tokens by the attention of the relevant words; cluster the best dropped ones and keep the means.

    SparseVLM 1.5, arXiv 2410.04417. The words ("raters") are the text tokens that the visual embeddings look at more
    than at the average one. Of the dropped tokens the best `share` are candidates, one cluster per `per_cluster` of
    them (plus one); density-peak clustering over features (S, N, D) at the place of the cut. recycle=False only ranks.

    Differs from the authors' code: the budget includes the clusters, kept + clusters equals it exactly; a cluster
    stands at the place of its centre, not behind all kept tokens; equal densities are ordered by index instead of by
    noise; the token counts of a stage follow the recipe, not a table of four budgets; a word is a rater where it is
    above average by more than a hundred-thousandth of it (the code lets rounding decide between words that are alike),
    and where no word is, all are (the code yields NaN); raters and ranks are worked out in float32 (in bfloat16 the
    code's own rounding moves 3 to 9 of 25 raters). Version 2.0 is a recipe of parts.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})

    recycle: bool = True
    share: float = Field(default=0.3, gt=0, lt=1)
    per_cluster: int = Field(default=10, ge=1)

    @property
    def facts(self) -> Facts:
        """As of any reducer; without recycling nothing is merged."""
        return replace(super().facts, merges=self.recycle)

    def needs(self) -> tuple[Need, ...]:
        """Return the attention from the chosen words."""
        return (Attention(rows="chosen"), Features())

    def choose_rows(self, tokens: VisualTokens) -> Tensor:
        """Return bool (S, T), the text tokens of more than average relevance, all of them where none is above."""
        return ops.relevant_words(tokens.features, tokens.mask, tokens[Features("text")], tokens.words)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the ranked tokens and the cluster means."""
        split = [
            ops.recycle_split(n, k, self.share, self.per_cluster) if self.recycle else (k, 0, 0)
            for n, k in zip(tokens.current, tokens.counts, strict=True)
        ]
        return Reduction(*keep_and_recycle(tokens[Attention(rows="chosen")], tokens.features, tokens.mask, split))
