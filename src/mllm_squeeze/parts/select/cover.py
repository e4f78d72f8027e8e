"""Tokens that cover the words of the prompt first, and then all other tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Normed, Place, Projection

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["features", "normed"]


def both_sides(by: Space) -> tuple[Need, Need]:
    """Return the states of visual tokens and of words, at the place of the cut or behind the final norm."""
    return (Features(), Features(of="text")) if by == "features" else (Normed(), Normed("text"))


class Cover(Select):
    """Pick tokens that cover the words, and then each token as the farthest from those picked before.

    Each word has its nearest visual tokens; of all these the ones of largest cosine to their word get the share of the
    prompt, all where there are fewer. The rest of the budget is picked one by one, each the token of smallest likeness
    to what is there. arXiv 2505.10118; it reads no score, and keeps the budget to the token.

    by: the states that are compared, "normed" behind the final norm of the language model.
    share: of the budget, that the prompt gets at most.
    nearest: how many tokens a word has, a fraction of that share; at least one.
    """

    main: ClassVar[str | None] = "share"
    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    grouped: ClassVar[bool] = False

    by: Space = "features"
    share: float = Field(default=0.5, ge=0, le=1)
    nearest: float = Field(default=0.125, gt=0, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states of both sides."""
        return both_sides(self.by)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        mask = groups.label >= 0
        visual, text = (tokens[need] for need in both_sides(self.by))
        total = limit[:, 0].minimum(mask.sum(1))
        prompted = ops.share_of(total, self.share, down=True)
        each = ops.share_of(prompted, self.nearest, down=True).clamp(min=1)
        seeds = ops.nearest_to_words(visual, mask, text, tokens.words, each[:, None].expand_as(tokens.words), prompted)
        most = min(mask.shape[1], max(tokens.counts))
        keep = ops.farthest_from(visual, mask, seeds, total - seeds.sum(1), most, most)
        return Picks(keep.long() - 1)


class WeightedCover(Cover):
    """As `cover`, by the words whose keys are longest: such a word has more tokens, and its tokens come first.

    What the words take may be more than the share of the prompt, so that the budget is not met: this is what the
    authors' code of arXiv 2505.10118 does. A word of length l among w words of length L together has the larger of its
    number and ceil(number * w * l / L); a token is worth its cosine plus l, in the L1 norm.

    by: the states that are compared, "normed" behind the final norm of the language model.
    share: of the budget, that the prompt gets before words count by their length.
    nearest: how many tokens a word has at least, a fraction of that share; at least one.
    words: how many words count.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    known_count: ClassVar[bool] = False

    words: int = Field(default=8, ge=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states of both sides, and the keys of the words."""
        return (*both_sides(self.by), Projection("key", of="text"))

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        mask = groups.label >= 0
        visual, text = (tokens[need] for need in both_sides(self.by))
        length = tokens[Projection("key", of="text")].float().abs().sum(-1)
        spoken = ops.top_k_mask(length, tokens.words, self.words)
        length = length.masked_fill(~spoken, 0)
        total = limit[:, 0].minimum(mask.sum(1))
        prompted = ops.share_of(total, self.share, down=True)
        number = ops.share_of(prompted, self.nearest, down=True).clamp(min=1)[:, None]
        heard = spoken.sum(1, keepdim=True)
        mine = (number * heard / length.sum(1, keepdim=True).clamp(min=1e-12) * length).ceil().long()
        each = mine.maximum(number).masked_fill(~spoken, 0)
        wanted = (prompted.double() / (number * heard).clamp(min=1)[:, 0] * each.sum(1)).ceil().long()
        # All tokens stay where the budget is no smaller.
        wanted = wanted.where(total < mask.sum(1), total)
        seeds = ops.nearest_to_words(visual, mask, text, spoken, each, wanted, length)
        width = mask.shape[1]
        keep = ops.farthest_from(visual, mask, seeds, total - prompted, width, max(tokens.counts))
        return Picks((keep | (mask & (total >= mask.sum(1))[:, None])).long() - 1)


class CoverOfBoth(Select):
    """Pick the tokens most like any word, a sample of the farthest ones of its own, and what is best by both.

    The sample begins with the longest vector of unit length, as rounding leaves them; tokens that both name leave room
    for those of largest mix * likeness + (1 - mix) * distance from the sample, each scaled to 0 and 1.

    by: the states that are compared, "normed" behind the final norm of the language model.
    share: of the budget, that the prompt gets; the sample gets the rest.
    mix: the weight of likeness.
    """

    main: ClassVar[str | None] = "share"
    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    grouped: ClassVar[bool] = False

    by: Space = "features"
    share: float = Field(default=0.5, ge=0, le=1)
    mix: float = Field(default=0.5, ge=0, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states of both sides."""
        return both_sides(self.by)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        mask = groups.label >= 0
        visual, text = (tokens[need] for need in both_sides(self.by))
        total = limit[:, 0].minimum(mask.sum(1))
        # Half to even, as Python rounds.
        prompted = (total.double() * self.share).round().long()
        steps = min(mask.shape[1], max(tokens.counts))
        keep = ops.cover_of_both(visual, mask, text, tokens.words, prompted, total, self.mix, steps)
        return Picks(keep.long() - 1)
