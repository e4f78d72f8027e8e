"""How often a walk comes by a token that goes from token to token as they attend to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, Projection

if TYPE_CHECKING:
    from torch import Tensor


class PageRank(Score):
    """Score a token by where a walk ends that begins anywhere in the prompt and goes as tokens attend to each other.

    arXiv 2412.03248. The walk is that of each head of a block, by its logits times 1 / sqrt(d) and divided by the
    temperature, under the causal mask, without damping; heads are joined by the root of the mean square. Words take
    part, and those in front of the picture draw the walk to them. The products of all queries and keys are computed
    once for each step, so that it costs more than other scores.

    temperature: below 1 sharpens attention.
    steps: of the walk; one step is the attention received.
    block: -1 is the layer before the cut.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "temperature"

    temperature: float = Field(default=0.1, gt=0)
    steps: int = Field(default=5, ge=1)
    block: int = -1

    def needs(self) -> tuple[Need, ...]:
        """Return queries and keys of all tokens."""
        return self._projection("query"), self._projection("key")

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return where the walk ends."""
        query, key = self.needs()
        among = tokens.among[query]
        ranks = ops.page_rank(tokens[query], tokens[key], among.present, among.present, self.temperature, self.steps)
        return ranks.gather(1, among.place)

    def _projection(self, what: Literal["query", "key"]) -> Projection:
        return Projection(what, of="all", block=self.block, heads="each")
