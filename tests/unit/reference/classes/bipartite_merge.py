"""Merge the most similar pairs of an even/odd split: ToMe."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, Projection, Size

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


def match_and_weigh(
    keys: Tensor, mask: Tensor, budget: Tensor, lead: int = 0, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (assign, weights): the pairs merged to come down to the budget, and the weights of a size-weighted mean.

    keys: (S, N, d). budget: int64 (S,); one call removes at most half of the tokens. lead: special tokens in front,
    which shift the even/odd count. size: (S, N), patches in each token so far.
    """
    removed = (mask.sum(1) - budget).clamp(min=0)
    assign = ops.bipartite_match(keys, mask, removed, lead)
    return assign, ops.mean_weights(assign, size)


class BipartiteMerge(Reducer):
    """Merge each of the best-matched tokens at even positions into its most similar token at an odd position.

    ToMe, arXiv 2210.09461, with keys (S, N, d) as metric and means weighted by the patches in each token, S spans at
    once. With a CLS token in front (lead 1) it takes part in the count but is neither merged nor a target.
    proportional: add log(size) to the attention logits of each key. Off by default, as for MAE models and in the ports
    to LLaVA, because FlashAttention takes no bias.

    Differs from the authors' code: the order of the tokens is kept, a merged token stands at the place of its target;
    equal scores are ordered by index; the number per block follows from the budget and is spread evenly over the
    blocks.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"encoder"})
    merges: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})

    proportional: bool = False

    def needs(self) -> tuple[Need, ...]:
        """Return the keys of the block and the sizes so far."""
        return (Projection("key", heads="mean"), Size())

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return the budget, but at least half of the tokens, rounded up."""
        return max(min(current, budget), current - current // 2)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who is merged into whom, with size-weighted means."""
        keys, size = (tokens[need] for need in self.needs())
        assign, weights = match_and_weigh(keys, tokens.mask, tokens.budget, tokens.special_tokens, size)
        return Reduction(assign == ops.positions(assign), assign, weights)
