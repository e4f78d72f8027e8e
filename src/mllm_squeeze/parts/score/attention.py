"""How much attention a token receives in a block of the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Attention as AttentionNeed
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

Joined = Literal["mean", "sum", "max"]


class Attention(Score):
    """Score a token by the attention that it receives, softmax over all keys, in one block of the language model.

    rows: who looks: "last" the last prompt token, "text" the prompt behind its first visual token, "relevant" those of
        its words that look more than average at the picture (at layer 0), "visual" the visual tokens of the span, "all"
        every token that sees the key.
    block: "before" is the layer before the cut, "next" previews the layer behind it; a number is that layer.
    heads, over_rows: how heads and rows are joined.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "rows"

    rows: Literal["last", "text", "relevant", "visual", "all"] = "last"
    block: int | Literal["before", "next"] = "before"
    heads: Joined = "mean"
    over_rows: Joined = "mean"

    def needs(self) -> tuple[Need, ...]:
        """Return the attention that each visual token receives."""
        block = -1 if self.block == "before" else self.block
        rows = "chosen" if self.rows == "relevant" else self.rows
        return (AttentionNeed(block, rows=rows, heads=self.heads, over_rows=self.over_rows),)

    def row_needs(self) -> tuple[Need, ...]:
        """Return the embeddings of both sides where the words are chosen by them."""
        return (Features(), Features("text")) if self.rows == "relevant" else ()

    def choose_rows(self, tokens: VisualTokens) -> Tensor:
        """Return bool (S, T), the words of more than average relevance, all of them where none is above."""
        return ops.relevant_words(tokens.features, tokens.mask, tokens[Features("text")], tokens.words)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the attention received."""
        return tokens[self.needs()[0]]
