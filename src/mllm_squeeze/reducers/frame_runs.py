"""Over the first layers of a language model tokens join those before them that they are like; then few stay."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.segment.frame import size_of_frames
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Attention, Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

# Of the models of 7B parameters that the authors tried.
_LAYERS = 28
_SEEN = Attention(block=-1, rows="last", heads="mean")


def share_to_remove(removed: tuple[float, ...], layers: int, cost: float) -> float:
    """Return the share of what is there that has to leave now, so that layers cost so much on average as from now on.

    removed: the shares of what was there that left by now, layer by layer. layers: of the language model. cost: of all
    tokens in all layers, as a fraction.
    """
    there, used = 1.0, 0.0
    for share in removed:
        there *= 1 - share
        used += there
    rest = (layers * cost - used) / ((layers - len(removed)) * there)
    return min(1.0, max(0.0, 1 - rest))


class FrameRuns(Reducer):
    """Join tokens to the one before at their place that they are like, cut by cut, then keep what the prompt looks at.

    FrameFusion, arXiv 2501.01986, in the first layers of the language model. Tokens at one place of the grid are
    compared with the last one left before them; what has at least this cosine joins it, and a run becomes the mean of
    what it holds now, at its first token. Each cut is a cut of its own in a row of them, at layers that follow each
    other. Merging ends when less than `enough` of what is there can be joined, and the next cut keeps what the last
    prompt token attends to, so many that the layers cost `cost` on average; or when merging alone can do that: then
    the most alike join, and nothing more is done. How many stay follows from the video; it waits for the device.

    cost: what layers cost on average, as a fraction of what they would with all tokens.
    layers: the cost is that of so many; None for those of the language model, and 28 where that is not known.
    alike: the smallest cosine of what joins.
    enough: the share of what is there, at least, that has to be alike for merging to go on.
    last: this is the last cut: what joins does so, and what more has to leave is what is looked at least. It takes a
        budget, too.

    Differs from the authors' code: it acts behind a layer, where that acts between its attention and its MLP, so that
    the states that are compared hold what the MLP adds, and the MLP still sees all tokens; attention is that of the
    same layer. Layers are those of the model, where that counts 28 of any. Sums run in float32. Cuts are as many as a
    recipe names, where the code goes on from layer to layer. One token of a video stays at least.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    cost: float = Field(default=0.3, gt=0, le=1)
    layers: int | None = Field(default=None, ge=1)
    alike: float = Field(default=0.6, ge=-1, le=1)
    enough: float = Field(default=0.1, ge=0, le=1)
    last: bool = False

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut, and what the last prompt token looked at in the layer before."""
        return (Features(), _SEEN)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what joins whom."""
        place = _places(tokens)
        alike = ops.likeness_before(tokens.features, place, tokens.mask)
        can = (alike >= self.alike) & tokens.mask
        found = can.sum(1).tolist()
        plans = [self._plan(tokens, span, number) for span, number in enumerate(found)]
        joining, leaving = (ops.on_device([plan[n] for plan in plans], place) for n in (0, 1))
        joins = ops.top_k_mask(alike, can, joining)
        assign = ops.joined_to_before(joins, place, tokens.mask)
        left = tokens.mask & ~joins
        keep = ops.top_k_mask(tokens[_SEEN], left, left.sum(1) - leaving)
        kept = keep.gather(1, assign.clamp(min=0)) & tokens.mask
        return Reduction(keep, assign.masked_fill(~kept, -1))

    def _plan(self, tokens: VisualTokens, span: int, found: int) -> tuple[int, int]:
        """Return how many tokens of a span join others, and how many others leave.

        found: how many are alike enough.
        """
        there = tokens.current[span]
        removed, phase = self._phase(tokens, span)
        share = share_to_remove(removed, self._layers(tokens), self.cost)
        if tokens.asked:
            wanted = max(0, there - tokens.counts[span])
        elif phase == "done":
            return 0, 0
        elif phase == "prune":
            wanted = there - max(1, round(there * (1 - share)))
        else:
            wanted = min(int(share * there), there - 1)
        if phase != "merge":
            return 0, wanted
        join = found if found / there < share and not tokens.asked else min(found, wanted)
        return join, max(0, wanted - join) if self.last or tokens.asked else 0

    def _layers(self, tokens: VisualTokens) -> int:
        return self.layers or tokens.depth or _LAYERS

    def _phase(self, tokens: VisualTokens, span: int) -> tuple[tuple[float, ...], str]:
        """Return the shares that left in cuts by now, and whether the next one merges, prunes or is "done"."""
        sizes = list(tokens.history[span]) if tokens.history else []
        # What is no piece of the picture stays, and does not count.
        beside = sizes[-1] - tokens.current[span] if sizes else 0
        sizes = [size - beside for size in sizes]
        removed: list[float] = []
        phase = "merge"
        for before, after in pairwise(sizes):
            share, wanted = 1 - after / before, share_to_remove(tuple(removed), self._layers(tokens), self.cost)
            if phase == "prune" or before - after >= math.floor(wanted * before):
                phase = "done"
            elif phase == "merge" and share < self.enough:
                phase = "prune"
            removed.append(share)
            if phase == "done":
                break
        return tuple(removed), phase


def _places(tokens: VisualTokens) -> Tensor:
    """Return int64 (S, N), the place on the grid of a frame; what has none is at a place of its own."""
    height, width = size_of_frames(tokens)
    row, column = tokens.grid[..., 2], tokens.grid[..., 3]
    own = height * width + ops.positions(tokens.mask)
    return (row * width + column).where(row >= 0, own)
