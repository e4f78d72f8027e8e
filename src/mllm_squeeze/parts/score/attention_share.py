"""Which part of the attention to a picture or video a token gets, over several blocks of the language model."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Attention, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class AttentionShare(Score):
    """Score a token by its share of what the last prompt token gives to the span, mean over heads and blocks.

    arXiv 2512.06866: the softmax is over the tokens of the span only, so that all heads and blocks count alike.

    blocks: how many, counted back from the cut.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "blocks"

    blocks: int = Field(default=1, ge=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the attention of each head of each block."""
        return tuple(Attention(-back, rows="last", heads="each") for back in range(1, self.blocks + 1))

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the mean share."""
        shares = (ops.attention_share(tokens[need], tokens.mask) for need in self.needs())
        return functools.reduce(operator.add, shares) / self.blocks
