"""How much a token receives from one query that stands for all, and how long it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place, Projection

if TYPE_CHECKING:
    from torch import Tensor


class GlobalQuery(Score):
    """Score a token by the attention that it receives from the mean query of all up to the end of its picture.

    Queries and keys are those in front of the rotary embedding; what stands in front of the picture takes part in the
    softmax. No attention map is needed. arXiv 2504.08966.

    times: "norm" multiplies it by the length of the token's state, "none" does not.
    block: "next" previews the layer behind the cut, -1 is the layer before it.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "times"

    times: Literal["norm", "none"] = "norm"
    block: int | Literal["next"] = "next"

    def needs(self) -> tuple[Need, ...]:
        """Return queries and keys of all tokens, and the states that are measured."""
        return (self._projection("query"), self._projection("key"), *([Features()] if self.times == "norm" else []))

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the attention received, times the length."""
        import torch

        query, key = self._projection("query"), self._projection("key")
        among = tokens.among[query]
        last = among.place.masked_fill(~tokens.mask, -1).amax(1, keepdim=True)
        order = torch.arange(among.present.shape[1], device=last.device)
        seen = ops.global_query_attention(tokens[query], tokens[key], among.present & (order <= last))
        received = seen.gather(1, among.place)
        return received * tokens.features.float().norm(dim=-1) if self.times == "norm" else received

    def _projection(self, what: Literal["query", "key"]) -> Projection:
        return Projection(what, of="all", block=self.block, rope=False, heads="each")
