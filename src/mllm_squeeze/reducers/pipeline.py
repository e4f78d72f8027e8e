"""The reducer of a step that names none: score, segment, budget, select and merge, run one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze.parts.base import ABudget, AMerge, AScore, ASegment, ASelect, Part, counts_as_asked
from mllm_squeeze.parts.budget.even import Even
from mllm_squeeze.parts.segment.whole import Whole
from mllm_squeeze.parts.select.top_k import TopK
from mllm_squeeze.reducers.base import Facts, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import EVERYWHERE, Need, Place

if TYPE_CHECKING:
    from mllm_squeeze.layout import Tile


class Pipeline(Reducer):
    """Parts instead of a class of its own: what it reads, where it may act and what is known of it follow from them.

    score: a number per token, None where the selection needs none.
    segment: what belongs together; all of a span by default.
    budget: how the tokens to keep are shared over the groups; in proportion to their size by default.
    select: which tokens are picked; the best of each group by default.
    merge: what becomes of the others; they are dropped by default.
    """

    places: ClassVar[frozenset[Place]] = EVERYWHERE - {"cache"}

    score: AScore | None = None
    segment: ASegment = Whole()
    budget: ABudget = Even()
    select: ASelect = TopK()
    merge: AMerge | None = None

    @property
    def facts(self) -> Facts:
        """What follows from the parts."""
        parts, needs = list(self._parts()), self.needs()
        decides = self.budget.decides or self.select.decides
        known = not decides and all(part.known_count for part in parts)
        return Facts(
            places=self.places.intersection(*(part.places for part in parts), *(need.places for need in needs)),
            known_count=known,
            exact=known and all(counts_as_asked(part) for part in parts),
            decides=decides,
            merges=self.merge is not None,
            reads_text=any(need.reads_text for need in needs),
            modalities=self.modalities.intersection(*(part.modalities for part in parts)),
        )

    def needs(self) -> tuple[Need, ...]:
        """Return the signals that the parts read."""
        return tuple(dict.fromkeys(need for part in self._parts() for need in part.needs()))

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span are left."""
        return self.select.count(current, self.budget.count(current, budget, tiles), tiles)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return what the parts make of the tokens."""
        groups = self.segment.segment(tokens)
        score = None if self.score is None else self.score.score(tokens, groups)
        limit = self.budget.allot(tokens, groups, score)
        picks = self.select.select(tokens, groups, score, limit)
        return Reduction(picks.keep) if self.merge is None else self.merge.merge(tokens, groups, picks, score)

    def _parts(self) -> Iterator[Part]:
        given = (self.score, self.segment, self.budget, self.select, self.merge)
        return (part for part in given if part is not None)
