"""What stays the same in pieces of a video is averaged, and all is clustered."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.segment.frame import frame_tables
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

# Nearest frames or tokens, itself included, that a density looks at.
_NEIGHBOURS = 7


class SteadyClusters(Reducer):
    """Average what stays the same in each piece of a video, and cluster that and what moves in each frame.

    PruneVid, arXiv 2412.16117, in front of the language model. Density-peak clusters of frames, made whole, are the
    pieces. A place is steady where its tokens in all frames of a piece are alike, mean cosine of all pairs; a piece
    keeps their mean, at its first frame. That, and of each frame what is not steady, is clustered, and each cluster is
    the mean of its tokens. How many stay follows from the video; a budget that the step asks for is shared over these
    groups in proportion to their size, and where it is larger than all of them, fewer stay. It waits for the device.

    steady: the mean cosine above which a place stays the same.
    pieces: how many clusters of frames there are, a fraction of their number rounded down, at least one.
    clusters: how many clusters of tokens there are, a fraction of the group rounded down.
    few: the size up to which a group is left as it is.

    Differs from the authors' code: no noise is added to densities; what is in a piece of one frame is not steady, where
    the code divides by zero; a cluster stands at its centre, and tokens stay in raster order.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    why_more: ClassVar[str] = "each frame with something that moves keeps a token at least"

    steady: float = Field(default=0.8, ge=-1, le=1)
    pieces: float = Field(default=0.25, gt=0, le=1)
    clusters: float = Field(default=0.5, gt=0, le=1)
    few: int = Field(default=14, ge=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what goes into it."""
        place = ops.positions(tokens.mask).expand_as(tokens.mask)
        assign = place.masked_fill(~tokens.mask, -1).clone()
        for span, token in enumerate(frame_tables(tokens)):
            if tokens.asked and tokens.counts[span] >= tokens.current[span]:
                continue
            x = tokens.features[span].float()[token]
            # What is no piece of the picture stays, and counts.
            beside = tokens.current[span] - token.numel()
            into = self._clip(x, tokens.counts[span] - beside if tokens.asked else None)
            assign[span, token.flatten()] = token.flatten()[into]
        return Reduction((assign == place) & tokens.mask, assign)

    def _clip(self, x: Tensor, budget: int | None) -> Tensor:
        """Return int64 (T * P,), whom each token of a video goes into."""
        import torch

        frames, places = x.shape[:2]
        runs = self._pieces(x)
        steady = torch.stack([self._steady(x[first : last + 1]) for first, last in runs])
        numbers = steady.sum(1).tolist()
        # A group for each piece, of what is steady there, and then one for each frame.
        sizes = numbers + [
            places - number for (first, last), number in zip(runs, numbers, strict=True) for _ in range(first, last + 1)
        ]
        counts = self._counts(sizes, budget)
        owner = torch.arange(frames * places, device=x.device).view(frames, places)
        for number, (first, last) in enumerate(runs):
            run, still = owner[first : last + 1], steady[number]
            means = torch.where(still[:, None], x[first : last + 1].mean(0), 0)[None]
            joined = _joined(means, still[None], counts[number : number + 1])[0]
            moving = ~still[None].expand(len(run), -1)
            each = counts[len(runs) + first : len(runs) + last + 1]
            own = run[:, :1] + _joined(x[first : last + 1], moving, each)
            owner[first : last + 1] = torch.where(still, run[0, 0] + joined, own)
        return owner.flatten()

    def _pieces(self, x: Tensor) -> list[tuple[int, int]]:
        """Return (first, last) of the pieces of a video."""
        import torch

        mean = x.mean(1)[None]
        number = torch.tensor([max(1, ops.floor_exact(len(x) * self.pieces))], device=x.device)
        mask = torch.ones(mean.shape[:2], dtype=torch.bool, device=x.device)
        return ops.run_bounds(ops.whole_runs(ops.density_peaks(mean, mask, number, _NEIGHBOURS)[0].tolist()))

    def _steady(self, x: Tensor) -> Tensor:
        """Return bool (P,), the places where all frames of a piece, (W, P, D), are alike."""
        frames = len(x)
        if frames == 1:
            return x.new_zeros(x.shape[1]).bool()
        pairs = ops.unit(x).sum(0).square().sum(-1) - frames
        return pairs / (frames * (frames - 1)) > self.steady

    def _counts(self, sizes: list[int], budget: int | None) -> list[int]:
        """Return how many tokens each group keeps."""
        if budget is None:
            return [size if size <= self.few else max(1, ops.floor_exact(size * self.clusters)) for size in sizes]
        there = [size for size in sizes if size]
        shares = iter(ops.share_counts(max(budget, len(there)), there))
        return [next(shares) if size else 0 for size in sizes]


def _joined(x: Tensor, mask: Tensor, counts: list[int]) -> Tensor:
    """Return int64 (R, P), the centre of the cluster of each token; -1 where mask is False."""
    import torch

    return ops.density_peaks(x, mask, torch.tensor(counts, device=x.device), _NEIGHBOURS)
