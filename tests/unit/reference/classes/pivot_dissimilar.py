"""Keep a few pivots and the tokens least like them: DART."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Normed, Place, Projection

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile

Side = tuple["Tensor", "Tensor", "Tensor"]  # norms (S, X), features (S, X, D), mask bool (S, X)


def pivots_and_dissimilar(visual: Side, text: Side, total: Tensor, pivots: int, words: int) -> Tensor:
    """Return bool (S, N): the `pivots` visual tokens of largest norm, and for each pivot in turn those least like it.

    The `words` text tokens of largest norm are pivots as well, but are not counted. total: int64 (S,), tokens to keep;
    what the visual pivots leave of it is shared evenly among all pivots, the first ones taking one more. Ties: lowest
    index.
    """
    norms, features, mask = visual
    image, real = ops.best_first(norms, mask, pivots)
    word, spoken = ops.best_first(text[0], text[2], min(words, text[0].shape[1]))
    real = real & (ops.positions(real) < total[:, None])
    kept = ops.top_k_mask(norms, mask, total.clamp(max=pivots))
    alike = [ops.cosine(ops.take(part, index), features) for part, index in ((features, image), (text[1], word))]
    return kept | ops.least_alike_in_turns(mask & ~kept, alike, (real, spoken), total - kept.sum(1))


class PivotDissimilar(Reducer):
    """Keep the visual tokens of largest key norm as pivots, and those least similar to them and to pivot words.

    DART, arXiv 2502.11494. Norms are L1 over keys (S, N, Hkv * d); likeness is the cosine of features after the
    language model's final norm (S, N, D). variant: "paper" keeps the budget exactly; "official" adds the visual pivots
    to floor(budget / pivots) tokens per pivot, as the authors' code does (128 keeps 132, 60 keeps 60).

    Differs from the authors' code: pivots take turns by descending norm, visual ones first (the code follows the hash
    order of a set); with fewer words than pivots the others take their share; a budget below the number of visual
    pivots keeps the largest of them; a ratio is turned into a whole number of tokens before it is shared (0.778 of 576
    keeps 132, the code 124). The paper's duplication threshold is used by neither.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})

    pivots: int = Field(default=4, ge=1)
    words: int = Field(default=4, ge=0)
    variant: Literal["paper", "official"] = "paper"

    def needs(self) -> tuple[Need, ...]:
        """Return keys and normed features."""
        return (Projection("key"), Projection("key", of="text"), Normed(), Normed("text"))

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return the budget, or for the official variant what its sharing makes of it."""
        if self.variant == "official" and budget < current:
            every = self.pivots + self.words
            budget = self.pivots + budget // every * every
        return min(current, budget)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the pivots and the tokens that are least like them."""
        total = [self.count(n, k, ()) for n, k in zip(tokens.current, tokens.counts, strict=True)]
        visual = (tokens[Projection("key")].float().abs().sum(-1), tokens[Normed()], tokens.mask)
        spoken = (tokens[Projection("key", of="text")].float().abs().sum(-1), tokens[Normed("text")], tokens.words)
        keep = pivots_and_dissimilar(visual, spoken, ops.on_device(total, tokens.mask), self.pivots, self.words)
        return Reduction(keep)
