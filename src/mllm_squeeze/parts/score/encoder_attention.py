"""How much attention a token receives in a block of the vision encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import EncoderAttention as EncoderAttentionNeed
from mllm_squeeze.reducers.needs import EncoderBlock, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class EncoderAttention(Score):
    """Score a token by the attention that its patch receives in one block of the vision encoder; separators get -inf.

    rows: who looks: "cls" the CLS token, "all" the sum over all patches, "cls_or_all" the first where the encoder has a
        CLS token, else the second, "probe" the pooling head's query where the tower, or the text encoder that is given,
        has such a head, "outliers" the mean over the tokens that receive more than `factor` times the average
        themselves, "others" the sum over all patches but its own.
    block: "feature" is the layer whose output the projector gets; a number counts from the first block, a negative one
        from the last; a float between 0 and 1 is a fraction of the depth, rounded down.
    heads: how heads are joined.
    factor: of outliers, arXiv 2508.05211.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    main: ClassVar[str | None] = "rows"

    rows: Literal["cls", "all", "cls_or_all", "probe", "outliers", "others"] = "cls_or_all"
    block: EncoderBlock = "feature"
    heads: Literal["mean", "sum", "max"] = "sum"
    factor: float = Field(default=0.0, ge=0)

    def needs(self) -> tuple[Need, ...]:
        """Return the attention that each patch receives."""
        return (EncoderAttentionNeed(block=self.block, rows=self.rows, heads=self.heads, factor=self.factor),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the attention received."""
        return tokens[self.needs()[0]]
