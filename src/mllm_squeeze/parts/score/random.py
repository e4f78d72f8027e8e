"""A number drawn from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import field_validator

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Random(Score):
    """Score tokens by uniform noise; spans of one length get the same.

    The draw depends on the seed and the number of tokens only: not on the batch, the device or the calls before.

    seed: from -2**63 to 2**64 - 1, as torch takes them.
    """

    main: ClassVar[str | None] = "seed"

    seed: int = 0

    @field_validator("seed")
    @classmethod
    def _seed(cls, seed: int) -> int:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"a seed is a whole number from -2**63 to 2**64 - 1; got {seed}")
        return seed

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the noise."""
        return ops.seeded_noise(tokens.mask, tokens.current, self.seed)
