"""How much of the picture's variety a token carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Spectrum(Score):
    """Score a token by its part in the singular vectors of its span, each weighted by its singular value.

    arXiv 2503.10501: sum over c of |U[i, c]| * S[c] of the states U S V^T, in float64. On a GPU the decomposition waits
    for the device.

    by: the vectors that are decomposed, see `mllm_squeeze.parts.vectors`.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the weight of each token."""
        return ops.spectral_weight(tokens[need_of(self.by)], groups.label >= 0)
