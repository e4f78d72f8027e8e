"""Tokens that are linked by likeness become one: in each frame, then over the whole video."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.segment.frame import frames_of
from mllm_squeeze.reducers.base import Mix, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

# Halvings of the interval of cosines: finer than what two features differ by.
_STEPS = 16


class LinkComponents(Reducer):
    """Merge tokens that are linked by likeness, frame by frame and then over the whole span.

    LLaVA-Scissor, arXiv 2506.21862. Two tokens are linked if their cosine is above a number, or if both are linked with
    others that are. A component of a frame becomes the mean of its tokens, a component of these means their mean; then
    each token of the span is added to the mean that it is most like, and all are divided by how many that are, the mean
    itself included. A component stands at the token of most links, in its frame, of most links of all. What stays
    follows from the content. A budget that is asked for lowers the number until no more stay, and sets the tokens free
    that are least like what they went into, until as many do. Memory O(n * n) for the means of a span;
    it waits for the device.

    above: the cosine above which two tokens are linked.

    Differs from the authors' code: all tokens of a chain go into its mean (there some are lost where chains are long);
    tokens keep the place of the one that stands for them.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    above: float = Field(default=0.9, ge=-1, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stands for whom, and the weights of all that go into it."""
        import torch

        x, mask = tokens.features.float(), tokens.mask
        above = torch.full((len(mask),), self.above, device=mask.device)
        first, second, means = self._components(tokens, above)
        if tokens.asked:
            first, second, means = self._components(tokens, self._lowered(tokens))
        place = ops.positions(mask)
        targets = mask & (second == place)
        slots = max(1, int(targets.sum(1).max()))
        into = ops.remerged(x, targets, means, mask, slots)
        if not tokens.asked:
            return Reduction(targets, mix=_mix(first, second, into, mask))
        far = 1 - ops.paired_cosine(x, into)
        free = ops.top_k_mask(far, mask & ~targets, (tokens.budget - targets.sum(1)).clamp(min=0))
        whole = (tokens.budget >= mask.sum(1))[:, None]
        return Reduction(targets | free, mix=_mix(first, second, into, mask, (free | (mask & whole))))

    def _components(self, tokens: VisualTokens, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        frame, count = frames_of(tokens)
        size = ops.segment_count(frame, count)
        return ops.components_in_turn(tokens.features.float(), frame, count, max(1, int(size.max())), above)

    def _lowered(self, tokens: VisualTokens) -> Tensor:
        """Return float (S,), the largest cosine found by halving at which no more stay than are asked for."""
        import torch

        low = torch.full((len(tokens.mask),), -1.01, device=tokens.mask.device)
        high = torch.full_like(low, 1.0)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            _, second, _ = self._components(tokens, middle)
            stay = (tokens.mask & (second == ops.positions(second))).sum(1)
            fits = stay <= tokens.budget
            low, high = middle.where(fits, low), high.where(fits, middle)
        return low


def _mix(first: Tensor, second: Tensor, into: Tensor, mask: Tensor, free: Tensor | None = None) -> Mix:
    """Return what goes into whom: each token into the mean of means, and into the mean that it is most like.

    first, second, into: int64 (S, N), who stands for a token in its frame, in the span, and whom it is most like. free:
    bool (S, N), tokens that stay as they are, beside their part in the means.
    """
    import torch

    free = mask & False if free is None else free
    width = mask.shape[1]
    member, added = mask.float(), (mask & ~free).float()
    same = torch.zeros_like(member)
    tokens_of = same.scatter_add(1, first.clamp(min=0), member)
    nodes = (first == ops.positions(first)) & mask
    nodes_of = same.scatter_add(1, second.clamp(min=0), nodes.float())
    total = 1 + same.scatter_add(1, into.clamp(min=0), added)

    def of(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index.clamp(min=0))

    share = member / (of(tokens_of, first) * of(nodes_of, second) * of(total, second)).clamp(min=1)
    more = added / of(total, into)
    place = ops.positions(mask).expand_as(mask)
    span = torch.arange(len(mask), device=mask.device)[:, None].expand(-1, width)
    # A token that stays as it is takes up nothing.
    itself = of(free.long(), second) == 1
    share = share.masked_fill(itself, 0)
    entries = [
        (span, second.clamp(min=0), place, share),
        (span, into.clamp(min=0), place, more),
        (span, place, place, free.float()),
    ]
    return Mix(*(torch.cat([part.flatten() for part in parts]) for parts in zip(*entries, strict=True)))
