"""Keep what the vision encoder looks at, and merge the rest into an even sample of it: VisionZip."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import EncoderAttention, EncoderProjection, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


def dominate_and_merge(
    saliency: Tensor, keys: Tensor, mask: Tensor, budget: Tensor, contextual: Tensor, slots: int
) -> Tensor:
    """Return assign (S, N): dominant tokens and contextual targets to themselves, others to the most similar target.

    saliency: (S, N), -inf at separators. keys: (S, N, d). budget, contextual: int64 (S,), tokens in all and those of
    them that are targets. slots: host number, the largest `contextual`.
    """
    dominant = ops.top_k_mask(saliency, mask, budget - contextual)
    rest = mask & ~dominant
    left = rest & (saliency != -float("inf"))
    step = left.sum(1).div(contextual.clamp(min=1), rounding_mode="floor").clamp(min=1)[:, None]
    place = ops.local_index(left)
    targets = left & (place % step == 0) & (place < step * contextual[:, None])
    # Too few pieces of the picture are left: separators fill the budget.
    short = contextual - targets.sum(1)
    filler = ops.top_k_mask(saliency, rest & ~left, short)
    assign = ops.nearest_target(keys, targets, left, slots)
    return ops.positions(mask).where(dominant | filler, assign)


class DominantContextual(Reducer):
    """Keep the tokens of largest encoder saliency ("dominant"); merge the others by key similarity ("contextual").

    VisionZip, arXiv 2412.04467. The share `contextual` of the budget (1 / 6.4: 10 of 64, 20 of 128, 30 of 192, rounded
    half up) are targets at an even stride over the tokens left, in raster order; the others join the target whose
    encoder key has the largest cosine. Reads saliency (S, N) and encoder_keys (S, N, d).
    variant: "official" adds the mean of the joined tokens to the target, as the authors' code does; "paper" takes the
    mean of all.

    Differs from the authors' code: it merges the features that the LLM gets, behind the projector; the CLS token is not
    passed on, so all of the budget are patches (the code counts CLS as one dominant token); contextual tokens stand at
    the place of their target; a tiled image has one budget; separators come last and are dropped, not merged.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    merges: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})

    contextual: float = Field(default=0.15625, ge=0, lt=1)
    variant: Literal["official", "paper"] = "official"

    def needs(self) -> tuple[Need, ...]:
        """Return what the encoder looks at and its keys."""
        return (EncoderAttention(), EncoderProjection())

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the dominant and the contextual tokens."""
        counts = [min(n, k) for n, k in zip(tokens.current, tokens.counts, strict=True)]
        shares = [ops.floor_exact(k * self.contextual + 0.5) for k in counts]
        budget, contextual = ops.on_device([counts, shares], tokens.mask)
        assign = dominate_and_merge(
            tokens[EncoderAttention()], tokens[EncoderProjection()], tokens.mask, budget, contextual, max(shares)
        )
        weights = ops.added_mean_weights(assign) if self.variant == "official" else None
        return Reduction(assign == ops.positions(assign), assign, weights)
