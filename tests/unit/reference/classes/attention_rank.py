"""Keep the tokens that the prompt looks at: FastV and PyramidDrop."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Attention, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


def most_attended(attention: Tensor, mask: Tensor, budget: Tensor) -> Tensor:
    """Return bool (S, N), the `budget` (S,) tokens of largest attention (S, N); ties take the lowest index."""
    return ops.top_k_mask(attention, mask, budget)


class AttentionRank(Reducer):
    """Keep the visual tokens that receive most attention from the prompt in one decoder layer.

    rows: "last" reads the last prompt token's row, "text" the mean over the prompt behind the first visual token.
    source: "current" reads the layer before the cut (FastV, arXiv 2403.06764), "next" previews the layer behind it
    (PyramidDrop, arXiv 2410.17247).

    Differs from the authors' code: padded batches and several images or videos are allowed, each span with a budget of
    its own; ties take the lowest index. FastV: kept counts round half up instead of half to even. PyramidDrop: the
    count of a stage is N * rho rounded half up, where the code truncates it (7 * 0.5 keeps 4, not 3); long prompts
    are not cut off.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})

    rows: Literal["last", "text"] = "last"
    source: Literal["current", "next"] = "current"

    def needs(self) -> tuple[Need, ...]:
        """Return the attention that each visual token receives."""
        return (Attention("next" if self.source == "next" else -1, rows=self.rows),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the most attended tokens of each span."""
        return Reduction(most_attended(tokens[self.needs()[0]], tokens.mask, tokens.budget))
