"""How much more the prompt looks at a token than one does who has not read the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Attention, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class PriorContrast(Score):
    """Score a token by p * log(p / q): p is the attention of the prompt, q that of the first token behind the picture.

    arXiv 2606.24156. That token sees the picture but not the question, so q is what a model looks at anyway. Both are
    shares of the attention to the span, in the layer before the cut. Where the picture ends the prompt there is no
    prior, and p counts.

    rows: who asks: "last" the last prompt token, "text" all words behind the picture, "question" all but the last.
    heads: how heads are joined, behind the mean over rows.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "rows"

    rows: Literal["last", "text", "question"] = "text"
    heads: Literal["mean", "max"] = "mean"

    def needs(self) -> tuple[Need, ...]:
        """Return the rows of those that ask, and all rows of the words, of which one is the prior."""
        asking = {"last": (self._last(),), "text": (self._text(),), "question": (self._text(), self._last())}
        return (*asking[self.rows], self._each())

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the contrast; negative where the prior is larger."""
        rows = tokens[self._each()]
        # The first row that sees the span at all: an earlier word, between two pictures, has nothing for the later one.
        inside = groups.label >= 0
        sees = rows.masked_fill(~inside[:, None], 0).sum(2) > 0
        first = sees.int().argmax(1)[:, None, None].expand(-1, 1, rows.shape[2])
        return ops.beyond_prior(self._asked(tokens, inside), rows.gather(1, first)[:, 0], inside)

    def _asked(self, tokens: VisualTokens, inside: Tensor) -> Tensor:
        """Return (S, N), the attention of those that ask."""
        last = tokens[self._last()] if self.rows != "text" else None
        if self.rows == "last":
            assert last is not None
            return self._joined(last)
        asked = tokens[self._text()]
        if last is None:
            return self._joined(asked)
        rest = (asked - last).clamp(min=0)
        # A single word is the last one.
        outside = ~inside if rest.ndim == 2 else ~inside[:, None]
        alone = ((rest == 0) | outside).flatten(1).all(1).view(-1, *(1,) * (rest.ndim - 1))
        return self._joined(last.where(alone, rest))

    def _joined(self, attention: Tensor) -> Tensor:
        return attention.amax(1) if attention.ndim == 3 else attention

    def _last(self) -> Attention:
        return Attention(rows="last", heads="mean" if self.heads == "mean" else "each")

    def _text(self) -> Attention:
        return Attention(rows="text", heads="mean" if self.heads == "mean" else "each", over_rows="sum")

    def _each(self) -> Attention:
        return Attention(rows="text", heads=self.heads, over_rows="each")
