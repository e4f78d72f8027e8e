"""How much the CLS token attends to a token when its heads are taken as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.parts.segment.crop import crops_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import EncoderBlock, EncoderProjection, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class UndividedAttention(Score):
    """Score a token by the attention of the encoder's CLS token with all heads as one; separators get -inf.

    softmax(q . k / sqrt(d)) over the tokens of a crop, or frame, and the CLS token itself, d the width of all heads
    together. Needs a tower with a CLS token.

    block: counts from the first block of the encoder, a negative one from the last; "feature" is the layer whose output
        the projector gets.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    main: ClassVar[str | None] = "block"

    block: EncoderBlock = -1

    def needs(self) -> tuple[Need, ...]:
        """Return the query of the CLS token, the keys, and its own key."""
        query, own = (EncoderProjection(what, self.block, "concat", cls=True) for what in ("query", "key"))
        return (query, EncoderProjection("key", self.block, "concat"), own)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the attention."""
        crop, count = crops_of(tokens)
        frames = max((tile.frames for tiles in tokens.tiles for tile in tiles), default=1)
        label = (crop * frames + tokens.grid[..., 1].clamp(min=0)).masked_fill(crop < 0, -1)
        query, key, own = (tokens[need] for need in self.needs())
        return ops.undivided_attention(query, key, own, label, count * frames)
