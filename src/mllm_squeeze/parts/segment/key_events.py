"""The events of a video that bear on the question, and the others."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Groups, Part
from mllm_squeeze.parts.segment.events import Events, best_frame
from mllm_squeeze.reducers.base import VisualTokens


class KeyEvents(Events):
    """Tell key events from others: groups as `events` has them, the parts key and other.

    A share of the events are key events, those with the best frame by relevance; the first of equal ones. arXiv
    2506.02850.

    below: the cosine of neighbouring frames below which an event ends; None cuts a video where they are least alike,
        into a number of events that follows from that of its frames.
    frames: frames of an event on average, where the number follows; rounded up.
    most: how many events there are at most, where the number follows.
    by: the vectors whose mean describes a frame, see `mllm_squeeze.parts.vectors`.
    relevance: a score whose mean over a frame is its relevance.
    share: of the events, that are key events, rounded up.
    """

    parts: ClassVar[tuple[str, ...]] = ("key", "other")
    main: ClassVar[str | None] = "relevance"

    relevance: AScore
    share: float = Field(default=0.5, ge=0, le=1)

    def inside(self) -> tuple[Part, ...]:
        """Return the relevance."""
        return (self.relevance,)

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per event."""
        groups = super().segment(tokens)
        there = ops.segment_count(groups.label, groups.count) > 0
        key = ops.best_groups(best_frame(tokens, groups, self.relevance), there, self.share)
        part = (~key.gather(1, groups.label.clamp(min=0))).long().masked_fill(groups.label < 0, -1)
        return Groups(groups.label, groups.count, part=part)
