"""The reducer of a step that names none: score, segment, budget, select and merge, run one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from mllm_squeeze.parts.base import ABudget, AMerge, AScore, ASegment, ASelect, Groups, Part, Score, counts_as_asked
from mllm_squeeze.parts.budget.even import Even
from mllm_squeeze.parts.fitting import Given, check_parts
from mllm_squeeze.parts.segment.whole import Whole
from mllm_squeeze.parts.select.top_k import TopK
from mllm_squeeze.parts.stage import Half, joined, reduced
from mllm_squeeze.reducers.base import Facts, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import EVERYWHERE, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


class Pipeline(Reducer):
    """Parts instead of a class of its own: what it reads, where it may act and what is known of it follow from them.

    score: a number per token, None where the selection needs none.
    segment: what belongs together; all of a span by default.
    budget: how the tokens to keep are shared over the groups; in proportion to their size by default.
    select: which tokens are picked; the best of each group by default.
    merge: what becomes of the others; they are dropped by default.
    parts: instead of select and merge, one half for each of the names that the segment tells apart.
    """

    places: ClassVar[frozenset[Place]] = EVERYWHERE - {"cache"}

    score: AScore | None = None
    segment: ASegment = Whole()
    budget: ABudget = Even()
    select: ASelect = TopK()
    merge: AMerge | None = None
    parts: dict[str, Half] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _together(self) -> Pipeline:
        own = (self.score, self.segment, self.budget, self.select, self.merge)
        check_parts(Given(*own, self.parts, self.model_fields_set))
        return self

    @property
    def facts(self) -> Facts:
        """What follows from the parts."""
        parts, needs = list(self._parts()), self.needs()
        decides = self._decides()
        merges = [self.merge, *(half.merge for half in self.parts.values())]
        known = not decides and not self.parts and all(part.known_count for part in parts)
        return Facts(
            places=self.places.intersection(*(part.places for part in parts), *(need.places for need in needs)),
            known_count=known,
            exact=known and all(counts_as_asked(part) for part in parts),
            decides=decides,
            merges=any(merge is not None for merge in merges),
            reads_text=any(need.reads_text for need in needs),
            modalities=self.of_its_modality(self.modalities.intersection(*(part.modalities for part in parts))),
            why_more=next((part.why_more for part in parts if part.why_more), self.why_more),
        )

    @property
    def proportional(self) -> bool:
        """True where attention in the encoder is shared in proportion to what was merged."""
        return bool(getattr(self.merge, "proportional", False))

    def needs(self) -> tuple[Need, ...]:
        """Return the signals that the parts read."""
        return tuple(dict.fromkeys(need for part in self._parts() for need in part.needs()))

    def row_needs(self) -> tuple[Need, ...]:
        """Return the signals that `choose_rows` reads."""
        score = self._chooser()
        return super().row_needs() if score is None else score.row_needs()

    def choose_rows(self, tokens: VisualTokens) -> Tensor:
        """Return bool (S, T), the words that a score chooses."""
        score = self._chooser()
        return super().choose_rows(tokens) if score is None else score.choose_rows(tokens)

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span are left."""
        allotted = self.budget.count(current, budget, tiles)
        if self.merge is not None and self.merge.picks:
            return self.merge.count(current, allotted, tiles)
        return self.select.count(current, allotted, tiles)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return what the parts make of the tokens."""
        groups = self.segment.segment(tokens)
        score = None if self.score is None else self.score.score(tokens, groups)
        limit = self.budget.allot(tokens, groups, score)
        if self.parts:
            return self._in_halves(tokens, groups, score, limit)
        return reduced(tokens, groups, score, limit, self.select, self.merge)

    def _in_halves(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        assert groups.part is not None
        halves = []
        for number, name in enumerate(self.segment.parts):
            inside = (groups.part == number) & (groups.label >= 0)
            halves.append((inside, self.parts[name].reduce(tokens, groups, inside, score, limit)))
        return joined(halves)

    def _decides(self) -> bool:
        halves = [(half.budget, half.select) for half in self.parts.values()]
        deciding = [self.budget.decides, self.select.decides, self.merge is not None and self.merge.decides]
        own = [(budget is not None and budget.decides) or select.decides for budget, select in halves]
        return any(deciding) or (bool(own) and all(own))

    def _chooser(self) -> Score | None:
        scores = (part for part in self._parts() if isinstance(part, Score))
        return next((score for score in scores if score.row_needs()), None)

    def _parts(self) -> Iterator[Part]:
        for part in (self.score, self.segment, self.budget, self.select, self.merge):
            if part is not None:
                yield from part.every()
        for half in self.parts.values():
            yield from half.parts()
