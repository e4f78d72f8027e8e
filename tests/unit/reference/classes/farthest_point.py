"""Keep tokens that are as different from each other as can be: DivPrune."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


def most_diverse(features: Tensor, mask: Tensor, budget: Tensor, steps: int) -> Tensor:
    """Return bool (S, N), `budget` (S,) tokens picked farthest first by cosine distance of features (S, N, D).

    steps: host number, the largest budget.
    """
    return ops.farthest_point(features, mask, budget, steps)


class FarthestPoint(Reducer):
    """Keep the tokens that a greedy max-min search picks, starting from the most isolated one.

    DivPrune, arXiv 2503.02175; features (S, N, D), distance 1 - cosine, O(N) per pick.

    Differs from the authors' code: distances are float32; a picked token cannot be picked again (duplicates in the
    image make the code pass one token twice); several images, each with its budget; kept counts round half up.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the most diverse tokens of each span."""
        return Reduction(most_diverse(tokens.features, tokens.mask, tokens.budget, max(tokens.counts)))
