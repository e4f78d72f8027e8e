"""How far a token is from the mean of its span or group: VidCom2's measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Features, Need

if TYPE_CHECKING:
    from torch import Tensor


class Uniqueness(Score):
    """Score a token by how little it is like the mean of its span, or of its group: minus a sum of gaussian kernels.

    arXiv 2505.14454; vectors of length 1, computed in float32.

    against: which mean.
    channels: the fraction of channels, those of smallest variance over the span, that is looked at; 1 looks at all.
    """

    main: ClassVar[str | None] = "against"

    against: Literal["span", "group"] = "span"
    channels: float = Field(default=0.5, gt=0, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the uniqueness, from -5 to 0."""
        return groups.once((type(self), self.against, self.channels), lambda: self._score(tokens, groups))

    def _score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        x = groups.once(
            (type(self), self.channels), lambda: ops.quiet_channels(tokens.features, groups.label, self.channels)
        )
        if self.against == "span":
            return -ops.closeness(x, groups.label.clamp(max=0), 1)
        return -ops.closeness(x, groups.label, groups.count)
