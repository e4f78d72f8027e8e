"""All tokens of a span in one group."""

from __future__ import annotations

from mllm_squeeze.parts.base import Groups, Segment
from mllm_squeeze.reducers.base import VisualTokens


class Whole(Segment):
    """Put all tokens of a span into one group."""

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per span."""
        return Groups(tokens.mask.long() - 1, 1)
