"""How far a block of the language model moves a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place, States

if TYPE_CHECKING:
    from torch import Tensor


class Change(Score):
    """Score a token by how far the block before the cut moves it: the length of what is added to its state.

    by: "block" is the whole block, "attention" and "mlp" are its halves.
    sign: -1 keeps those that move least.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "by"

    by: Literal["block", "attention", "mlp"] = "block"
    sign: Literal[1, -1] = 1

    def needs(self) -> tuple[Need, ...]:
        """Return the states before and behind the block, or what its half adds."""
        return (Features(), States("in")) if self.by == "block" else (self._half(),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the Euclidean length of the change."""
        if self.by == "block":
            moved = tokens.features.float() - tokens[States("in")].float()
        else:
            moved = tokens[self._half()].float()
        return self.sign * moved.norm(dim=-1)

    def _half(self) -> States:
        return States("attention_out" if self.by == "attention" else "mlp_out")
