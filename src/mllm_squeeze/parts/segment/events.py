"""The events of a video: runs of frames that are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Groups, Segment
from mllm_squeeze.parts.segment.frame import frames_of
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Events(Segment):
    """Put the tokens of each event into a group: a run of frames that are alike, by the mean of their tokens.

    Frames of which nothing is left are passed over; separators go with the first frame.

    below: the cosine of neighbouring frames below which an event ends; None cuts a video where they are least alike,
        into a number of events that follows from that of its frames.
    frames: frames of an event on average, where the number follows; rounded up.
    most: how many events there are at most, where the number follows.
    by: the vectors whose mean describes a frame, see `mllm_squeeze.parts.vectors`.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    main: ClassVar[str | None] = "below"

    below: float | None = Field(default=None, ge=-1, le=1)
    frames: int = Field(default=8, ge=1)
    most: int = Field(default=8, ge=1)
    by: Vectors = "encoder_states"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per event."""
        frame, count = frames_of(tokens)
        pieces = frame.masked_fill(tokens.grid[..., 2] < 0, -1)
        numbers = [
            min(self.most, -(-sum(tile.frames for tile in tiles) // self.frames)) or 1
            for tiles in tokens.tiles or ((),) * len(frame)
        ]
        there = ops.segment_count(pieces, count) > 0
        mean = ops.segment_mean(tokens[need_of(self.by)], pieces, count)
        runs = ops.event_runs(mean, there, ops.on_device(numbers, frame) - 1, self.below)
        label = runs.gather(1, frame.clamp(min=0)).masked_fill(frame < 0, -1)
        return Groups(label, count if self.below is not None else max(numbers))


def best_frame(tokens: VisualTokens, groups: Groups, relevance: AScore) -> Tensor:
    """Return float32 (S, groups.count), the mean relevance of the best frame of each group; -inf where it has none."""
    score = relevance.score(tokens, groups).float()
    frame, count = frames_of(tokens)
    pieces = frame.masked_fill((score == -float("inf")) | (groups.label < 0), -1)
    mean = ops.segment_mean(score, pieces, count).gather(1, frame.clamp(min=0))
    return ops.segment_max(mean, groups.label.masked_fill(pieces < 0, -1), groups.count)
