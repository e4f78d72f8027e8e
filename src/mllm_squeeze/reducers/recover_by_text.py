"""Keep what the encoder marks, recover what the question asks for, and merge the rest into a few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Groups
from mllm_squeeze.parts.score.text_similarity import TextSimilarity
from mllm_squeeze.parts.score.undivided_attention import UndividedAttention
from mllm_squeeze.reducers.base import Mix, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import EncoderProjection, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

_KEYS = EncoderProjection("key", -1, "concat")


class RecoverByText(Reducer):
    """Keep tokens by the encoder's CLS token and by the question, and merge clusters of the rest.

    Recoverable compression, arXiv 2409.01179. How many of each follows from the picture: the share of scores that stand
    out from those near them (local outlier factor above `bar`). The best by the CLS token of the encoder's last layer,
    all heads as one, stay; of all others the best by their likeness to the question, in CLIP's space, come back. What
    is left has as many centres, of its best by the CLS token, as its share of outliers says of the channels of a key;
    each adds its `most` nearest, by key and question, weighted by their attention; the weighted sum of all that are no
    centres is one token more. Without a centre the rest is dropped. A budget that is asked for has `shares` of the
    three.

    score: what the encoder marks.
    neighbours, rest_neighbours: how many scores a score is compared with, of all tokens and of the rest.
    bar: the factor above which a score stands out.
    most: tokens that go into a centre.
    text_weight: of the likeness to the question beside that of keys.
    shares: of a budget, for the encoder's and the question's.
    fallback: whether the language model's own space may stand in where no text encoder is given.

    Differs from the authors' code: keys of the rest are its own (there those of other patches, by a slip of indices); a
    centre stands at its place and the one token more at the best of the others; where fewer than `most` are left all go
    into a centre; the question is what the text encoder makes of the words behind the picture (there of the padding's
    last place).
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    score: AScore = UndividedAttention(block=-1)
    neighbours: int = Field(default=20, ge=1)
    rest_neighbours: int = Field(default=10, ge=1)
    bar: float = Field(default=1.5, gt=0)
    most: int = Field(default=32, ge=1)
    text_weight: float = 50.0
    shares: tuple[float, float] = (0.6, 0.3)
    fallback: bool = False

    @property
    def _asked(self) -> TextSimilarity:
        return TextSimilarity(space="clip", over="mean", fallback=self.fallback)

    def needs(self) -> tuple[Need, ...]:
        """Return what the CLS token and the keys of the last layer are, and words and pictures in CLIP's space."""
        return tuple(dict.fromkeys((*self.score.needs(), _KEYS, *self._asked.needs())))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the survivors, and what goes into those that are merged."""
        import torch

        groups = Groups(torch.zeros_like(tokens.origin).masked_fill(~tokens.mask, -1), 1)
        seen, alike = self.score.score(tokens, groups), self._asked.score(tokens, groups)
        pieces = tokens.mask & (seen != -torch.inf)
        whole = tokens.asked & (tokens.budget >= tokens.mask.sum(1))[:, None]
        picked, question, merged = self._picked(tokens, seen, alike, pieces)
        rest = pieces & ~picked & ~whole
        centres = ops.top_k_mask(seen, rest, self._centres(tokens, seen, rest, merged))
        others = rest & ~centres & centres.any(1, keepdim=True)
        more = ops.top_k_mask(seen, others, 1)
        mix = self._mix(tokens, seen.float().masked_fill(~pieces, 0), question, (rest, centres, others, more))
        return Reduction(picked | centres | more | (tokens.mask & whole), mix=mix)

    def _mix(
        self, tokens: VisualTokens, weight: Tensor, question: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Mix:
        """Return what goes into the centres and the one token more; parts: the rest, and who is what in it."""
        import torch

        rest, centres, others, more = parts
        bonus = self.text_weight * question / tokens[self._asked.needs()[0]].shape[-1] ** 0.5
        slots = max(1, max(tokens.counts) if tokens.asked else int(centres.sum(1).max()))
        slots = min(slots, centres.shape[1])
        entries = (
            ops.neighbour_entries(tokens[_KEYS], weight, centres, rest.long() - 1, self.most, slots, bonus.float()),
            ops.group_sum_entries(weight, others, more, rest.long() - 1, 1),
        )
        return Mix(*(torch.cat(part) for part in zip(*entries, strict=True)))

    def _picked(
        self, tokens: VisualTokens, seen: Tensor, alike: Tensor, pieces: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return bool (S, N), what stays as it is; float32 (S, N), the likeness; int64 (S,), what a budget leaves."""
        number = pieces.sum(1)
        merged = number * 0
        if tokens.asked:
            first = ops.share_of(tokens.budget, self.shares[0])
            second = ops.share_of(tokens.budget, self.shares[1], down=True)
            merged = tokens.budget - first - second
            # A centre and the one token more make two.
            first, merged = first + merged.where(merged < 2, 0), merged.where(merged >= 2, 0)
        else:
            first = (number.double() * self._outliers(seen, pieces, self.neighbours)).floor().long()
        seen_best = ops.top_k_mask(seen, pieces, first)
        low = alike.masked_fill(~pieces, float("inf")).amin(1, keepdim=True)
        question = alike.where(~seen_best, low)
        if not tokens.asked:
            left = (number - first).double()
            second = (left * self._outliers(question, pieces, self.neighbours)).floor().long()
        wanted = pieces if not tokens.asked else pieces & ~seen_best
        return seen_best | ops.top_k_mask(question, wanted, second), question, merged

    def _outliers(self, score: Tensor, pieces: Tensor, neighbours: int) -> Tensor:
        """Return float64 (S,), the share of scores that stand out."""
        factors = ops.local_outlier_factors(score.masked_fill(~pieces, 0), pieces, neighbours)
        return (pieces & (factors > self.bar)).sum(1).double() / pieces.sum(1).clamp(min=1)

    def _centres(self, tokens: VisualTokens, seen: Tensor, rest: Tensor, merged: Tensor) -> Tensor:
        if tokens.asked:
            return (merged - 1).clamp(min=0)
        channels = tokens[_KEYS].shape[-1]
        return (channels * self._outliers(seen, rest, self.rest_neighbours)).floor().long().minimum(rest.sum(1))
