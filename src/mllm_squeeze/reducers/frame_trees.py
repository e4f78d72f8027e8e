"""Tokens that stand for their frame stay, the others hang together over the frames of a run and are clustered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Groups
from mllm_squeeze.parts.score.encoder_attention import EncoderAttention
from mllm_squeeze.parts.segment.frame import frame_tables
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

# Nearest tokens, itself included, that a density looks at, at most.
_NEIGHBOURS = 7


@dataclass(frozen=True)
class _Run:
    """A run of like frames: x, float32 (F, P, D), the states; seen, float32 (F, P), the score."""

    x: Tensor
    seen: Tensor


class FrameTrees(Reducer):
    """Keep what stands for its frame, and merge the rest of a run of like frames into trees, and those into clusters.

    FlashVID, arXiv 2602.08024, in front of the language model. The video is cut where a frame is unlike the next, into
    a few runs at least. Of a frame's share most are tokens that are looked at and unlike each other. Any other token
    hangs on the one of the frame before that it is most like, if like enough, and what hangs together becomes one, at
    its first token; of these each frame keeps the centres of density-peak clusters, so many in a run as are left of
    its share, and each cluster is their mean. How many stay follows from the video, about as many as asked for, as
    frames round up; it waits for the device.

    retain: the share that stays on average over the layers, where the step asks for no budget.
    expand: how many times as many stay here, as a later cut is to take more.
    runs: how many there are at least.
    unlike: the cosine below which a frame is unlike the next.
    best: the part of a frame's share that is picked.
    pick: how: "run" by distance to those picked, times the score, times the product with the mean of the run's frames;
        "seen" without that product, "unlike" by distance alone, "score" by the score alone.
    again: with "run", what was picked may be picked again in place of tokens of negative product, so that fewer are.
    hang: the cosine above which a token hangs on another.
    mean: "tree" is the mean of a tree, "handed" the sum of its tokens over one more than those that hang on its root.
    score: how much a token is looked at.

    Differs from the authors' code: no noise is added to densities; a picked token stands for itself only, where the
    code clusters runs of one frame with their picked tokens, so that some stay twice.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    why_more: ClassVar[str] = "each frame keeps its share rounded up"

    retain: float = Field(default=0.25, gt=0, le=1)
    expand: float = Field(default=1.25, gt=0)
    runs: int = Field(default=8, ge=1)
    unlike: float = Field(default=0.9, ge=-1, le=1)
    best: float = Field(default=0.7, ge=0, le=1)
    pick: Literal["run", "seen", "unlike", "score"] = "run"
    again: bool = False
    hang: float = Field(default=0.8, ge=-1, le=1)
    mean: Literal["tree", "handed"] = "tree"
    score: AScore = EncoderAttention(rows="cls_or_all", block=-1, heads="mean")

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut, and what the score reads."""
        return tuple(dict.fromkeys((Features(), *self.score.needs())))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what goes into it."""
        import torch

        seen = self.score.score(tokens, Groups(torch.zeros_like(tokens.origin), 1)).float()
        place = ops.positions(tokens.mask).expand_as(tokens.mask)
        assign = place.masked_fill(~tokens.mask, -1).clone()
        weights = tokens.mask.float()
        for span, token in enumerate(frame_tables(tokens)):
            each = self._each(token.shape[1], tokens, span)
            if each >= token.shape[1]:
                continue
            into, weight = self._clip(tokens.features[span].float()[token], seen[span][token], each)
            assign[span, token.flatten()] = token.flatten()[into.clamp(min=0)].masked_fill(into < 0, -1)
            weights[span, token.flatten()] = weight
        return Reduction((assign == place) & tokens.mask, assign, weights)

    def _each(self, places: int, tokens: VisualTokens, span: int) -> int:
        """Return how many tokens of a frame stay."""
        if not tokens.asked:
            return math.ceil(places * self.retain * self.expand)
        return max(1, math.ceil(round(places * tokens.counts[span] / tokens.current[span], 9)))

    def _clip(self, x: Tensor, seen: Tensor, each: int) -> tuple[Tensor, Tensor]:
        """Return (int64 (T * P,), float32 (T * P,)): whom each token of a video goes into, and with what weight."""
        import torch

        frame = ops.unit(x.mean(1))
        runs = ops.alike_runs((frame[1:] * frame[:-1]).sum(1).tolist(), self.runs, self.unlike)
        picks = math.ceil(each * self.best)
        into, weights = [], []
        for first, last in runs:
            run = _Run(x[first : last + 1], seen[first : last + 1])
            target, weight = self._run(run, picks, each - picks)
            into.append(torch.where(target < 0, -1, target + first * x.shape[1]))
            weights.append(weight)
        return torch.cat(into), torch.cat(weights)

    def _run(self, run: _Run, picks: int, others: int) -> tuple[Tensor, Tensor]:
        """Return whom each token of a run goes into, -1 is no one, and with what weight, both (F * P,)."""
        import torch

        picked = self._picked(run, picks)
        frames, places = picked.shape
        hung = ops.hung_on_frame_before(run.x, ~picked, self.hang, (picks + others) * frames)
        root, weight = ops.tree_weights(hung, self.mean == "tree")
        stays = (hung < 0) & ~picked
        trees = torch.zeros_like(run.x).flatten(0, 1)
        trees = trees.index_add(0, root.flatten(), (run.x * weight[..., None]).flatten(0, 1)).view(run.x.shape)
        # The rest of the share goes to frames by how many trees begin in them, rounded up.
        number = stays.sum(1).tolist()
        part = others * frames / max(1, sum(number))
        clusters = torch.tensor([math.ceil(n * part) for n in number], device=root.device)
        centre = ops.density_peaks(trees, stays, clusters, clusters.clamp(max=_NEIGHBOURS))
        kept = (clusters > 0)[:, None] & stays
        first = torch.arange(frames, device=root.device)[:, None] * places
        into = (centre + first).masked_fill(~kept, -1)
        members = ops.mean_weights(into.flatten()[None])[0].view(frames, places)
        into = torch.where(picked, ops.positions(picked) + first, into).flatten()
        members = torch.where(picked, 1.0, members).flatten()
        return into[root].flatten(), (weight * members[root]).flatten()

    def _picked(self, run: _Run, picks: int) -> Tensor:
        """Return bool (F, P), the tokens that stand for their frames."""
        import torch

        whole = torch.ones_like(run.seen, dtype=torch.bool)
        if self.pick == "score" or not picks:
            return ops.top_k_mask(run.seen, whole, picks)
        worth = torch.ones_like(run.seen) if self.pick == "unlike" else run.seen
        if self.pick == "run":
            # A sum of products, which autocast leaves in float32.
            worth = worth * (run.x * run.x.mean((0, 1))).sum(-1)
        return ops.calibrated_spread(run.x, worth, picks, self.again and self.pick == "run")
