"""What the encoder looks at stays, and the rest of a run of like frames goes into anchors of its last frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Groups
from mllm_squeeze.parts.score.encoder_attention import EncoderAttention
from mllm_squeeze.parts.segment.frame import frame_tables
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Mix, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

Entries = tuple["Tensor", "Tensor", "Tensor"]
# Nearest tokens, itself included, that a density looks at.
_NEIGHBOURS = 4


class DynamicDensity(Reducer):
    """Keep of each frame what scores best, and merge the rest of a run of like frames into anchors.

    FastVID, arXiv 2503.11187. The video is cut where a frame is unlike the next, into a few runs at least. Of a frame's
    share a part is context: every `period`-th frame of a run, counted from its last, has anchors for all of it, the
    density peaks of the tokens that are not kept. Each other token of the run goes, once for each frame with anchors,
    into the one that it is most like; an anchor counts `own` at least, and what went into it, itself included, the rest
    evenly. How many stay follows from the runs, about as many as asked for, as shares round down; it waits for the
    device.

    retain: the share that stays, where the step asks for no budget.
    runs: how many there are at least.
    unlike: the cosine below which a frame is unlike the next.
    context: the part of a frame's share that is for anchors.
    period: how many frames share anchors.
    own: the least weight of an anchor.
    score: by which tokens of a frame are kept.
    frames_by: the vectors whose mean is compared from frame to frame.

    Differs from the authors' code: no noise is added to densities; a frame is described by the mean of its tokens
    (there, for SigLIP, by what its pooling head makes of it), and its tokens by what patches attend to (there by the
    pooling head's query; score: {encoder_attention: probe} where the tower has one).
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    retain: float = Field(default=0.25, gt=0, le=1)
    runs: int = Field(default=8, ge=1)
    unlike: float = Field(default=0.9, ge=-1, le=1)
    context: float = Field(default=0.4, ge=0, le=1)
    period: int = Field(default=4, ge=1)
    own: float = Field(default=0.6, ge=0, le=1)
    score: AScore = EncoderAttention(rows="cls_or_all", heads="mean")
    frames_by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut, what frames are compared by, and what the score reads."""
        return tuple(dict.fromkeys((Features(), need_of(self.frames_by), *self.score.needs())))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what goes into it."""
        import torch

        seen = self.score.score(tokens, Groups(torch.zeros_like(tokens.origin), 1))
        described = tokens[need_of(self.frames_by)]
        keep, entries = tokens.mask.clone(), []
        for span, token in enumerate(frame_tables(tokens)):
            share = tokens.counts[span] / tokens.current[span] if tokens.asked else self.retain
            if share >= 1:
                continue
            x = tokens.features[span].float()
            kept, mixed = self._clip(token, x, seen[span], described[span].float(), share)
            keep[span] = keep[span].index_fill(0, token.flatten(), False).index_fill(0, kept, True)
            entries += [(torch.full_like(into, span), into, source, weight) for into, source, weight in mixed]
        if not entries:
            return Reduction(keep)
        return Reduction(keep, mix=Mix(*(torch.cat(part) for part in zip(*entries, strict=True))))

    def _clip(
        self, token: Tensor, x: Tensor, seen: Tensor, described: Tensor, share: float
    ) -> tuple[Tensor, list[Entries]]:
        """Return the tokens of a video that stay, and (into, source, weight) of those that are merged."""
        import torch

        places = token.shape[1]
        each = max(1, int(places * share + 1e-9))
        context = int(each * self.context + 1e-9)
        order = seen[token].argsort(dim=1, descending=True, stable=True)
        best, rest = order[:, : each - context], order[:, each - context :].sort(dim=1).values
        frame = ops.unit(described[token].mean(1))
        runs = ops.alike_runs((frame[1:] * frame[:-1]).sum(1).tolist(), self.runs, self.unlike)
        counts = ops.anchors_per_frame(runs, context, self.period)
        left = token.gather(1, rest)
        mask = torch.ones_like(left, dtype=torch.bool)
        number = torch.tensor(counts, device=token.device).clamp(max=left.shape[1])
        joined = ops.density_peaks(x[left], mask, number, _NEIGHBOURS)
        anchor = (joined == ops.positions(joined)) & (number > 0)[:, None]
        mixed = [
            self._into(x, left[frame_number][anchor[frame_number]], left[first : last + 1].flatten())
            for first, last in runs
            for frame_number in range(first, last + 1)
            if counts[frame_number]
        ]
        return torch.cat([token.gather(1, best).flatten(), left[anchor]]), mixed

    def _into(self, x: Tensor, anchors: Tensor, sources: Tensor) -> Entries:
        """Return what goes into the anchors of one frame; sources: of all frames of its run, the anchors included."""
        import torch

        nearest = ops.cosine(x[sources][None], x[anchors][None])[0].argmax(1)
        number = torch.bincount(nearest, minlength=len(anchors))
        own = (1 / (number + 1)).clamp(min=self.own)
        weight = ((1 - own) / number.clamp(min=1))[nearest]
        return (
            torch.cat([anchors, anchors[nearest]]),
            torch.cat([anchors, sources]),
            torch.cat([torch.where(number > 0, own, 1.0), weight]),
        )
