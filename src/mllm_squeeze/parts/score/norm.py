"""How long the vector of a token is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Norm(Score):
    """Score a token by the length of one of its vectors, in float32.

    of: which vector, see `mllm_squeeze.parts.vectors`.
    order: 1 adds up absolute values, 2 is the Euclidean length.
    sign: -1 keeps the shortest.
    """

    main: ClassVar[str | None] = "of"

    of: Vectors = "features"
    order: Literal[1, 2] = 2
    sign: Literal[1, -1] = 1

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.of),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the lengths."""
        x = tokens[need_of(self.of)].float()
        length = x.abs().sum(-1) if self.order == 1 else x.square().sum(-1).sqrt()
        return length * self.sign
