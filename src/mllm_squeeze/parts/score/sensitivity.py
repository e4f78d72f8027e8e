"""How far the projector moves a token whose patch is pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Place
from mllm_squeeze.reducers.needs import Sensitivity as SensitivityNeed

if TYPE_CHECKING:
    from torch import Tensor


class Sensitivity(Score):
    """Score a token by how far the projector moves it where what it gets is pushed; separators get -inf.

    arXiv 2509.24837: the mean over random directions, which are the same for all tokens, of the difference of a push
    forth and back, by twice its length. It runs the projector twice for each direction, in float32.

    directions: how many.
    step: the length of a push.
    seed: of the directions, from -2**63 to 2**64 - 1, as torch takes them.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    main: ClassVar[str | None] = "directions"

    directions: int = Field(default=64, ge=1)
    step: float = Field(default=0.01, gt=0)
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)

    def needs(self) -> tuple[Need, ...]:
        """Return how the projector answers."""
        return (SensitivityNeed(self.directions, self.step, self.seed),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return how far each token moves."""
        return tokens[self.needs()[0]]
