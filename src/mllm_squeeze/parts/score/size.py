"""How many tokens a token stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need
from mllm_squeeze.reducers.needs import Size as SizeNeed

if TYPE_CHECKING:
    from torch import Tensor


class Size(Score):
    """Score a token by how many were merged into it by now.

    sign: -1 keeps those that stand for few.
    """

    main: ClassVar[str | None] = "sign"

    sign: Literal[1, -1] = 1

    def needs(self) -> tuple[Need, ...]:
        """Return the sizes."""
        return (SizeNeed(),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the sizes."""
        return tokens[SizeNeed()].float() * self.sign
