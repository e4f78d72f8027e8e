"""How much the last blocks changed a token, in length and direction."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, States

if TYPE_CHECKING:
    from torch import Tensor


class Transition(Score):
    """Score a token by how much attention and MLP of the last blocks change it, in length and direction.

    For what a module gets, u, and adds, w: |w| / |u| times the softmax over all tokens of the prompt of 1 - cos(u, w),
    summed over modules and blocks. arXiv 2507.20630.

    blocks: how many, counted back from the cut.
    direction: "signed" lets a token count most that is turned round, "abs" takes 1 - |cos|: one that is turned by 90
        degrees.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "blocks"

    blocks: int = Field(default=1, ge=1)
    direction: Literal["signed", "abs"] = "signed"

    def needs(self) -> tuple[Need, ...]:
        """Return what attention and MLP of each block get and add."""
        return tuple(need for pair in self._modules() for need in pair)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the sum over modules."""
        return functools.reduce(operator.add, (self._change(tokens, u, w) for u, w in self._modules()))

    def _change(self, tokens: VisualTokens, given: States, added: States) -> Tensor:
        among = tokens.among[given]
        change = ops.transition(tokens[given], tokens[added], among.present, self.direction == "signed")
        return change.gather(1, among.place)

    def _modules(self) -> list[tuple[States, States]]:
        return [
            (States(f"{half}_in", of="all", block=-back), States(f"{half}_out", of="all", block=-back))  # type: ignore[arg-type]
            for back in range(1, self.blocks + 1)
            for half in ("attention", "mlp")
        ]
