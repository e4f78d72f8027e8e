"""Keep a random subset: the baseline that every method must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import field_validator

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Place

if TYPE_CHECKING:
    from torch import Tensor


def random_subset(mask: Tensor, budget: Tensor, current: tuple[int, ...], seed: int) -> Tensor:
    """Return bool (S, N), `budget` (S,) tokens drawn without replacement; spans of one length draw the same places.

    mask: bool (S, N) with `current` True in each row. The draw depends on the seed and the number of tokens only: not
    on the batch, the device or the calls before.
    """
    return ops.top_k_mask(ops.seeded_noise(mask, current, seed), mask, budget)


class RandomSubset(Reducer):
    """Keep a uniformly random subset of each span, the same at every call for a seed.

    No paper; S spans at once, mask bool (S, N). Report the mean over several seeds. seed: from -2**63 to 2**64 - 1,
    as torch takes them.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})

    seed: int = 0

    @field_validator("seed")
    @classmethod
    def _seed(cls, seed: int) -> int:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"a seed is a whole number from -2**63 to 2**64 - 1; got {seed}")
        return seed

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the drawn tokens of each span."""
        return Reduction(random_subset(tokens.mask, tokens.budget, tokens.current, self.seed))
