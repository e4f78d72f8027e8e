"""How much attention a token receives from words, those that matter to other words first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Attention, Need, Place, Side

if TYPE_CHECKING:
    from torch import Tensor


class GuidedAttention(Score):
    """Score a token by the attention of the words, each weighted by its attention to and from the words, head by head.

    arXiv 2508.06084: heads count by the mass that their words give each other. Memory O(heads * words * tokens).

    block: -1 is the layer before the cut, -2 the one before that; 0 and up is the layer of that number.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "block"

    block: int = -1

    def needs(self) -> tuple[Need, ...]:
        """Return what each word gives each token, and each word."""
        return self._given("visual"), self._given("text")

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the attention received."""
        to_tokens, to_words = (tokens[need] for need in self.needs())
        return ops.guided_by_words(to_words, to_tokens, tokens.words, tokens.mask)

    def _given(self, columns: Side) -> Attention:
        return Attention(self.block, rows="text", heads="each", over_rows="each", columns=columns)
