"""Give unusual frames more of the budget, and keep each frame's outliers: VidCom2."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor


def typicality(features: Tensor, frame: Tensor, frames: int, channels: float) -> tuple[Tensor, Tensor]:
    """Return (v, f), float32 (S, N): how near each token is to the mean of the video and to the mean of its frame.

    features: (S, N, D). frame: int64 (S, N), -1 for tokens that do not count. channels: the fraction of channels, those
    of smallest variance over the video, that is looked at.
    """
    whole = frame.clamp(max=0)
    x = features.detach().float()
    variance = ops.segment_mean((x - ops.segment_mean(x, whole, 1)).square(), whole, 1)[:, 0]
    quiet = ops.top_k_mask(-variance, variance >= 0, int(channels * x.shape[-1]))
    x = ops.unit(x * quiet[:, None])
    video = ops.segment_mean(x, whole, 1)
    centre = ops.take(ops.segment_mean(x, frame, frames), frame.clamp(min=0))
    return ops.gaussian_kernels((x - video).square().sum(-1)), ops.gaussian_kernels((x - centre).square().sum(-1))


def frame_budgets(v: Tensor, frame: Tensor, budget: Tensor, frames: int, temperature: float) -> Tensor:
    """Return int64 (S, frames), tokens to keep in each frame: about the mean share, more in untypical frames."""
    size = ops.segment_count(frame, frames)
    there = size > 0
    unique = -ops.segment_mean(v, frame, frames)
    p = (unique / temperature).masked_fill(~there, -float("inf")).softmax(1)
    share = (budget / size.sum(1).clamp(min=1))[:, None]
    scale = (share * (1 + p - 1 / there.sum(1, keepdim=True).clamp(min=1))).clamp(max=1)
    return (scale * size).round().clamp(min=1).long()


class FrameUniqueness(Reducer):
    """Keep in each frame the tokens least like the frame and the video; frames unlike the video keep more.

    VidCom2, arXiv 2505.14454; features (S, N, D), computed in float32. The budget is the mean share; that of frame t
    is scaled by 1 + p_t - 1 / T with p the softmax of its uniqueness at `temperature`, at most the whole frame, at
    least one token, half to even: the number kept follows the video and may miss the budget by rounding. `channels` is
    the fraction of channels, of smallest variance, that is looked at: the code's filter (1 turns it off), not in the
    paper.

    Differs from the authors' code: float32 instead of the model's dtype; the mean share is that of a budget in whole
    tokens (the code scales each frame by the ratio as it is, so that a frame on the edge may round the other way);
    batches; separators stay where they were (where they compete they count to the first frame). A video whose frames
    are not known counts as one frame.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    known_count: ClassVar[bool] = False
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    why_more: ClassVar[str] = "each frame keeps at least one token"

    temperature: float = Field(default=0.01, gt=0)
    channels: float = Field(default=0.5, gt=0, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return each frame's outliers."""
        mask = tokens.mask
        per_tile = [[tile.frames for tile in tiles] for tiles in tokens.tiles] or [[]] * len(tokens.current)
        frames = max(1, *(sum(f) for f in per_tile))
        frame = ops.frame_ids(tokens.grid, per_tile).clamp(min=0).masked_fill(~mask, -1)
        v, f = typicality(tokens.features, frame, frames, self.channels)
        limit = frame_budgets(v, frame, tokens.budget, frames, self.temperature)
        keep = ops.rank_within(-(v + f), frame, mask) < limit.gather(1, frame.clamp(min=0))
        everything = (tokens.budget >= mask.sum(1))[:, None]
        return Reduction((keep | everything) & mask)
