"""Tokens that are not what stood at their place one frame before."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.score.frame_change import likeness_before
from mllm_squeeze.parts.segment.frame import frames_of, size_of_frames
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class UnlikeBefore(Select):
    """Pick all of the first frame, and of the others what is unlike the token at its place one frame before.

    Always the whole frame before is compared, not what stayed of it. A budget that the step asks for takes the most
    unlike, the first frame before all others. arXiv 2504.17343.

    alike: the cosine above which a token is dropped; with `per_frame` the fraction of each frame that is, of largest
        cosine, rounded down, the first on ties.
    per_frame: whether a fraction of each frame is dropped.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    reach: how many cells, down and across, a frame may have moved as a whole since the one before; of all such moves
        the one counts that takes most of it off (the sum of cosines above `alike`, as far as they are above), and what
        has come into view is new. 0 compares place by place. arXiv 2507.15428.

    Raises:
        UnsupportedInputError: the frames are not known, or not of one size.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    main: ClassVar[str | None] = "alike"

    alike: float = Field(default=0.5, ge=-1, le=1)
    per_frame: bool = False
    by: Vectors = "features"
    reach: int = Field(default=0, ge=0, le=8)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        mask = groups.label >= 0
        alike, before = self._likeness(tokens)
        alike = alike.masked_fill(before < 0, -2)
        if tokens.asked:
            return Picks(ops.top_k_mask(-alike, mask, limit[:, 0]).long() - 1)
        if not self.per_frame:
            return Picks((mask & (alike <= self.alike)).long() - 1)
        frame, count = frames_of(tokens)
        old = mask & (before >= 0)
        number = ops.segment_count(frame.masked_fill(~old, -1), count).long()
        fewer = ops.share_of(number, max(self.alike, 0.0), down=True).gather(1, frame.clamp(min=0))
        return Picks((mask & ~(old & (ops.rank_within(alike, frame, old) < fewer))).long() - 1)

    def _likeness(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """Return float32 (S, N), the cosine to the token of the frame before, and int64 (S, N), which it is."""
        if not self.reach:
            return likeness_before(tokens, need_of(self.by))
        shape = (frames_of(tokens)[1], *size_of_frames(tokens))
        return ops.moved_before(
            tokens[need_of(self.by)], tokens.grid, frames_of(tokens)[0], shape, self.reach, self.alike
        )
