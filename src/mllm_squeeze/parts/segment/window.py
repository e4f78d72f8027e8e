"""Runs of frames."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mllm_squeeze.parts.base import Groups, Segment
from mllm_squeeze.parts.segment.frame import frames_of
from mllm_squeeze.reducers.base import VisualTokens


class Window(Segment):
    """Put the tokens of so many consecutive frames into a group; the last one may hold fewer.

    frames: frames per window.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    main: ClassVar[str | None] = "frames"

    frames: int = Field(default=4, ge=1)

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per window."""
        frame, count = frames_of(tokens)
        # Floor division keeps -1 for padding.
        return Groups(frame.div(self.frames, rounding_mode="floor"), -(-count // self.frames))
