"""How little of what a token says is new to the other tokens, and asked for by the words."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, Projection

if TYPE_CHECKING:
    from torch import Tensor

QUERY, KEY = Projection("query", heads="each"), Projection("key", heads="each")
ASKED, ASKING = Projection("key", of="text", heads="each"), Projection("query", of="text", heads="each")


class Redundancy(Score):
    """Score a token by what it gives the words behind the picture, less what it gives the visual tokens of its span.

    arXiv 2411.17686, of the block before the cut, mean over heads. Words that come later are seen as well: under the
    causal mask no visual token gives them anything. Memory O(tokens * (tokens + words)).

    of: "attention" is the softmax over the visual tokens and the words, and the mean over both; "logits" the products
        of queries and keys themselves, their sum over visual tokens and mean over words.
    share: of what it gives visual tokens.
    first: "stays" never drops the first token of a span, "competes" treats it as any other.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "of"

    of: Literal["attention", "logits"] = "attention"
    share: float = Field(default=0.6, ge=0, le=1)
    first: Literal["competes", "stays"] = "competes"

    def needs(self) -> tuple[Need, ...]:
        """Return queries and keys of the visual tokens, and keys of the words."""
        return QUERY, KEY, ASKED

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return minus the redundancy."""
        own, asked = given_to(tokens, tokens[QUERY], self.of)
        score = -ops.redundancy(own, asked, tokens.mask, tokens.words, self.share, self.of == "attention")
        if self.first == "competes":
            return score
        return score.masked_fill(ops.local_index(tokens.mask) == 0, float("inf"))


def given_to(tokens: VisualTokens, query: Tensor, of: str) -> tuple[Tensor, Tensor]:
    """Return what rows (S, R, H, d) give the visual tokens (S, R, N), and the words (S, R, T)."""
    import torch

    key = torch.cat([tokens[KEY], tokens[ASKED].to(tokens[KEY])], 1)
    if of == "attention":
        found = ops.open_attention(query, key, torch.cat([tokens.mask, tokens.words], 1))
    else:
        found = ops.head_mean_logits(query, key)
    width = tokens.mask.shape[1]
    return found[..., :width], found[..., width:]
