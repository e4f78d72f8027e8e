"""What stands still in runs of frames becomes a few clusters, and of the rest stays what the encoder looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.parts.score.encoder_attention import EncoderAttention
from mllm_squeeze.parts.segment.frame import frame_tables
from mllm_squeeze.reducers.base import Mix, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

_SEEN = EncoderAttention(rows="all", block=-1, heads="mean")
Entries = tuple["Tensor", "Tensor", "Tensor"]


@dataclass(frozen=True)
class _Clip:
    """One video: token, int64 (T, P), who stands where in each frame; x, (N, D); seen, float32 (N,)."""

    token: Tensor
    x: Tensor
    seen: Tensor


class StillSegments(Reducer):
    """Merge what stands still in runs of frames, and keep of each frame the rest that the encoder looks at.

    HoliTom, arXiv 2505.21334, in front of the language model. A place stands still in a run where each of its tokens
    has more than this cosine to the one of the frame before; runs are cut so that what stands still saves most. What is
    saved raises the share that stays. Of what stands still a run keeps the mean over its frames as density-peak
    clusters; of the rest each frame keeps that share, rounded up, of largest attention from the last block of the
    vision encoder. How many stay follows from the video, about as many as asked for; it waits for the device.

    retain: the share that stays, where the step asks for no budget.
    still: the cosine above which a place stands still.
    longest: frames of a run at most.
    own: the weight of a centre in its cluster.
    neighbours: of a density, at most.

    Differs from the authors' code: no noise is added to densities; a cluster stands at its centre's place in the first
    frame of its run; the share is that of each video, not of all that came before; the branch that clusters moving
    tokens (off by default, and broken there) is left out.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    why_more: ClassVar[str] = "each frame keeps a share of what moves in it, rounded up"

    retain: float = Field(default=0.25, gt=0, le=1)
    still: float = Field(default=0.8, ge=-1, le=1)
    longest: int = Field(default=1024, ge=1)
    own: float = Field(default=0.6, ge=0, le=1)
    neighbours: int = Field(default=7, ge=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut, and what patches receive in the encoder."""
        return (Features(), *_SEEN.needs())

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what goes into it."""
        import torch

        seen = _SEEN.score(tokens, Groups(torch.zeros_like(tokens.origin), 1))
        keep, entries = tokens.mask.clone(), []
        for span, token in enumerate(frame_tables(tokens)):
            share = tokens.counts[span] / tokens.current[span] if tokens.asked else self.retain
            if share >= 1:
                continue
            kept, mixed = self._clip(_Clip(token, tokens.features[span].float(), seen[span]), share)
            keep[span] = keep[span].index_fill(0, token.flatten(), False).index_fill(0, kept, True)
            entries += [(torch.full_like(into, span), into, source, weight) for into, source, weight in mixed]
        if not entries:
            return Reduction(keep)
        return Reduction(keep, mix=Mix(*(torch.cat(part) for part in zip(*entries, strict=True))))

    def _clip(self, clip: _Clip, share: float) -> tuple[Tensor, list[Entries]]:
        """Return the tokens of a video that stay, and (into, source, weight) of those that are merged."""
        import torch

        frames, places = clip.token.shape
        unit = ops.unit(clip.x)[clip.token]
        calm = (unit[1:] * unit[:-1]).sum(-1) > self.still
        runs, saved = ops.most_still(ops.still_counts(calm).tolist(), self.longest)
        share = min(share / ((frames * places - saved) / (frames * places)), 1.0)
        kept, mixed = [], []
        for first, last in runs:
            still = calm[first:last].all(0) if last > first else calm.new_zeros(places)
            moving = clip.token[first : last + 1][:, ~still]
            best = math.ceil(moving.shape[1] * share)
            order = clip.seen[moving].argsort(dim=1, descending=True, stable=True)[:, :best]
            kept.append(moving.gather(1, order).flatten())
            clusters = round(int(still.sum()) * share)
            if clusters:
                found = self._clusters(clip, clip.token[first : last + 1][:, still], clusters)
                mixed.append(found)
                kept.append(found[0].unique())
        return torch.cat(kept), mixed

    def _clusters(self, clip: _Clip, token: Tensor, clusters: int) -> Entries:
        """Return what goes into the clusters of what stands still; token: int64 (W, n), of a run of frames."""
        import torch

        means = clip.x[token].mean(0)[None]
        mask = torch.ones(means.shape[:2], dtype=torch.bool, device=token.device)
        number = torch.tensor([clusters], device=token.device)
        into, weight = ops.cluster_weights(means, mask, number, self.neighbours, self.own)
        target = token[0, into[0]].expand_as(token)
        return target.flatten(), token.flatten(), (weight[0] / len(token)).expand_as(token).flatten()
