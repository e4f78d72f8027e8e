"""A few pivots, and for each in turn the tokens least like it."""

from __future__ import annotations

from torch import Tensor

from .greedy import least_alike_in_turns
from .precision import selection
from .score import cosine
from .select import best_first, positions, take, top_k_mask


@selection
def pivots_and_dissimilar(
    norms: Tensor,
    features: Tensor,
    mask: Tensor,
    word_norms: Tensor,
    word_features: Tensor,
    word_mask: Tensor,
    total: Tensor,
    pivots: int,
    words: int,
) -> Tensor:
    """Return bool (S, N): the `pivots` tokens of largest norm, and for each pivot in turn the tokens least like it.

    The `words` text tokens of largest norm are pivots as well, but are not counted. What the visual pivots leave of the
    total is shared evenly among all pivots, the first ones taking one more. Ties: lowest index.

    norms: (S, N). features: (S, N, D). mask: bool (S, N). word_norms, word_features, word_mask: the same of the words,
    (S, T, ...). total: int64 (S,), tokens to keep.
    """
    image, real = best_first(norms, mask, pivots)
    word, spoken = best_first(word_norms, word_mask, min(words, word_norms.shape[1]))
    real = real & (positions(real) < total[:, None])
    kept = top_k_mask(norms, mask, total.clamp(max=pivots))
    sides = ((features, image), (word_features, word))
    alike = [cosine(take(side, index), features) for side, index in sides]
    return kept | least_alike_in_turns(mask & ~kept, alike, (real, spoken), total - kept.sum(1))
