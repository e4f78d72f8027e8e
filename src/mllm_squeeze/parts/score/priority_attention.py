"""How much attention a token receives from words, over the heads that look at the picture, whatever its distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Attention, Features, Need, Place, Rotary

if TYPE_CHECKING:
    from torch import Tensor


class PriorityAttention(Score):
    """Score a token by the attention of words, divided by what rotary positions alone prefer, over the best heads.

    SparseVLM 2.0 ("+"), arXiv 2410.04417. Attention after the softmax is divided by the logit of a query and a key that
    are all ones, at the positions of word and token. The heads that then give a span most are averaged. Memory
    O(heads * words * tokens), in float32.

    Differs from the authors' code: a divisor nearer to zero than a millionth counts as that; fewer heads than asked for
    are all taken (the code raises); channels that are not turned count as turned by nothing; where positions have three
    axes, the angles of a channel are those of its axis.

    rows: who looks: "relevant" those words that look more than average at the picture (at layer 0), "text" the prompt
        behind its first visual token.
    block: "before" is the layer before the cut; a number is that layer.
    best_heads: how many heads are averaged, None for all.
    gravity: whether attention is divided.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "rows"

    rows: Literal["relevant", "text"] = "relevant"
    block: int | Literal["before"] = "before"
    best_heads: int | None = Field(default=14, ge=1)
    gravity: bool = True

    def needs(self) -> tuple[Need, ...]:
        """Return the attention of each word in each head, and the angles of words and tokens."""
        block = self._block()
        return (self._attention(), *((Rotary(block=block), Rotary("text", block)) if self.gravity else ()))

    def row_needs(self) -> tuple[Need, ...]:
        """Return the embeddings of both sides where the words are chosen by them."""
        return (Features(), Features("text")) if self.rows == "relevant" else ()

    def choose_rows(self, tokens: VisualTokens) -> Tensor:
        """Return bool (S, T), the words of more than average relevance, all of them where none is above."""
        return ops.relevant_words(tokens.features, tokens.mask, tokens[Features("text")], tokens.words)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the attention received."""
        gravity = None
        if self.gravity:
            words, visual = tokens[Rotary("text", self._block())], tokens[Rotary(block=self._block())]
            gravity = ops.rotary_gravity(words, visual)
        return ops.freed_attention(tokens[self._attention()], tokens.mask, gravity, self.best_heads)

    def _attention(self) -> Attention:
        rows: Literal["chosen", "text"] = "chosen" if self.rows == "relevant" else "text"
        return Attention(self._block(), rows=rows, heads="each", over_rows="each")

    def _block(self) -> int:
        return -1 if self.block == "before" else self.block
