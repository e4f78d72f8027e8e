"""How little a token is like the token most like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Isolation(Score):
    """Score a token by 1 - cosine to the other token of its span that is most like it; 2 for a single token.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the distance to the nearest token."""
        return 1 - ops.nearest_similarity(tokens[need_of(self.by)], groups.label >= 0)
