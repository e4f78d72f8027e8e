"""Fit a video into a budget: like frames leave, some stay whole, the others shrink, and last goes what stands still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.segment.frame import frame_tables
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = Features(of="text")


@dataclass(frozen=True)
class _Clip:
    """One video: x, (T, P, D); described, (T, E); small, int64 (P,), the first place of the window of each place.

    meaning: (D,), the mean of the words.
    """

    x: Tensor
    described: Tensor
    small: Tensor
    meaning: Tensor


class FrameResolution(Reducer):
    """Drop frames like those around them, and keep whole those nearest to the words; the others shrink to averages.

    LongVU, arXiv 2410.17434, in front of the language model. Where the video does not fit its budget, a frame leaves
    whose mean cosine to the frames of its window is not below `alike`. If all others fit when they are small, as many
    as there is room for stay whole, those of largest mean dot product with the words behind the picture. Else all are
    small, and in each run of frames only those tokens stay that are unlike the one at their place in the run's first
    frame; what is still too much is cut from the end of each run. How many stay follows from the video, never more than
    asked for; it waits for the device.

    frames_by: the vectors by which frames are compared, one behind the other, see `mllm_squeeze.parts.vectors`.
    window: frames of a window.
    alike: the mean cosine, itself included, from which on a frame leaves.
    small: the share of its tokens that a small frame has at most: as large a grid as that allows, of windows averaged.
    run: frames of a run.
    still: the cosine to the run's first frame from which on a token leaves.

    Differs from the authors' code: frames are compared by what the model's own encoder sees, not by DINOv2; small
    frames are averages, where the trained model has queries of its own for them; the budget is the step's, not what
    is left of the context; frames leave only where the video does not fit, and are not limited to 400.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    known_count: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    frames_by: Vectors = "encoder_states"
    window: int = Field(default=16, ge=1)
    alike: float = Field(default=0.83, gt=0, le=1)
    small: float = Field(default=0.444444444, gt=0, le=1)
    run: int = Field(default=8, ge=1)
    still: float = Field(default=0.8, ge=-1, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states of tokens and words at the place of the cut, and what frames are compared by."""
        return tuple(dict.fromkeys((Features(), _WORDS, need_of(self.frames_by))))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what goes into it."""
        described, words = tokens[need_of(self.frames_by)], tokens.words[..., None]
        meaning = tokens[_WORDS].float().masked_fill(~words, 0).sum(1) / words.sum(1).clamp(min=1)
        place = ops.positions(tokens.mask).expand_as(tokens.mask)
        assign = place.masked_fill(~tokens.mask, -1).clone()
        for span, token in enumerate(frame_tables(tokens)):
            # What is no piece of the picture stays, and counts.
            budget = max(1, tokens.counts[span] - (tokens.current[span] - token.numel()))
            if budget >= token.numel():
                continue
            clip = _Clip(
                tokens.features[span].float()[token],
                described[span].float()[token].flatten(1),
                self._windows(tokens, span, token),
                meaning[span],
            )
            into = self._fitted(clip, budget).flatten()
            assign[span, token.flatten()] = token.flatten()[into.clamp(min=0)].where(into >= 0, -1)
        return Reduction((assign == place) & tokens.mask, assign)

    def _windows(self, tokens: VisualTokens, span: int, token: Tensor) -> Tensor:
        """Return int64 (P,), the first place of the window that each place of a small frame is averaged in."""
        tile = tokens.tiles[span][0]
        high, wide = ops.pooled_size(tile.height, tile.width, ops.share_of_count(tile.height * tile.width, self.small))
        _, _, h, w = tokens.grid[span, token[0]].unbind(-1)
        row = (h * high).div(tile.height, rounding_mode="floor")
        column = (w * wide).div(tile.width, rounding_mode="floor")
        return ops.segment_first((row * wide + column)[None], high * wide)[0]

    def _fitted(self, clip: _Clip, budget: int) -> Tensor:
        """Return int64 (T, P), whom each token of a video goes into, counted through all frames; -1 for nobody."""
        import torch

        frames, places = clip.x.shape[:2]
        frame = ops.frames_unlike_window(clip.described, self.window, self.alike).nonzero().flatten()
        small = clip.small.expand(len(frame), -1)
        place = torch.arange(places, device=frame.device)
        first = clip.small == place
        windows = ops.segment_mean(clip.x[frame], small, places)[:, first]
        room = budget - windows.shape[0] * windows.shape[1]
        if room >= 0:
            each = places - windows.shape[1]
            near = (windows.mean(1) * clip.meaning).sum(-1)
            into = torch.where(self._best(near, room // each if each else len(near))[:, None], place, small)
        else:
            stays = torch.zeros_like(small, dtype=torch.bool)
            stays[:, first] = ops.without_tails(ops.unlike_first_frame(windows, self.run, self.still), self.run, budget)
            into = small.where(stays.gather(1, small), -1)
        out = torch.full((frames, places), -1, device=frame.device)
        out[frame] = torch.where(into >= 0, into + frame[:, None] * places, -1)
        return out

    def _best(self, near: Tensor, number: int) -> Tensor:
        """Return bool (T,), so many frames of largest relevance, the first on ties."""
        return ops.top_k_mask(near[None], near[None].isfinite(), near.new_tensor([number]).long())[0]
