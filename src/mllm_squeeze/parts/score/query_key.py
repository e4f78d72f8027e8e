"""What the queries of the words and the keys of the tokens say of each other, some heads more than others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, Projection, Side

if TYPE_CHECKING:
    from torch import Tensor


class QueryKey(Score):
    """Score a token by the product of its key and the mean query of the words, without rotary embedding or softmax.

    Each head is brought to one scale over the tokens, and its weight says how much it counts. arXiv 2604.07812.

    weights: a number per head of the queries; None lets all count alike.
    normalise: how a head is brought to scale: "l2" to length 1, "softmax" to a sum of 1, "minmax" to [0, 1], "none".
    block: "next" previews the layer behind the cut, -1 is the layer before it.

    Raises:
        UnsupportedInputError: the layer has another number of heads than weights are given.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "weights"

    weights: tuple[float, ...] | None = None
    normalise: Literal["l2", "softmax", "minmax", "none"] = "l2"
    block: int | Literal["next"] = "next"

    def needs(self) -> tuple[Need, ...]:
        """Return queries of the words and keys of the tokens."""
        return self._projection("query", "text"), self._projection("key", "visual")

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the weighted sum over heads."""
        import torch

        query, key = (tokens[need] for need in self.needs())
        products = ops.query_key_products(query, tokens.words, key)
        heads = products.shape[1]
        if self.weights is not None and len(self.weights) != heads:
            raise UnsupportedInputError(
                f"{len(self.weights)} weights are given, and the layer has {heads} heads of queries. Give one weight "
                "per head, or none: weights: null."
            )
        weights = None if self.weights is None else ops.on_device(torch.tensor(self.weights), products)
        return ops.weighted_heads(products, groups.label >= 0, weights, self.normalise)

    def _projection(self, what: Literal["query", "key"], of: Side) -> Projection:
        return Projection(what, of=of, block=self.block, rope=False, heads="each")
