"""What a part is: typed parameters around one pure function, of one of five kinds.

A pipeline runs them in this order: `Segment` puts tokens into groups, `Score` gives each token a number, `Budget` says
how many each group keeps, `Select` picks them, `Merge` says what becomes of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, model_validator

from mllm_squeeze.errors import did_you_mean
from mllm_squeeze.reducers.base import MODALITIES, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import EVERYWHERE, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile

Kind = Literal["score", "segment", "budget", "select", "merge"]
KINDS: tuple[Kind, ...] = ("score", "segment", "budget", "select", "merge")


@dataclass(frozen=True)
class Groups:
    """Which tokens belong together.

    label: int64 (S, N), the group of each token, from 0 to count - 1; -1 for padding and tokens of no group.
    count: how many groups a span has at most, on the host.
    part: int64 (S, N), which half of a video a token belongs to, an index into the names of `Segment.parts`; None where
        there is one part only. All tokens of a group are of one part.
    widest: how many tokens the largest group may hold, on the host; None where it follows from the content.
    """

    label: Tensor
    count: int
    part: Tensor | None = None
    widest: int | None = None
    _known: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` gives, worked out once for all parts of a run that name the same key."""
        if key not in self._known:
            self._known[key] = compute()
        return cast("Tensor", self._known[key])


@dataclass(frozen=True)
class Picks:
    """Which tokens were picked, and when.

    turn: int64 (S, N), the turn of a selection in which a token was picked, from 0; -1 where it was not.
    most: for each turn how many tokens of a span are picked in it at most, on the host; empty where that is not known.
    """

    turn: Tensor
    most: tuple[int, ...] = ()

    @property
    def keep(self) -> Tensor:
        """Bool (S, N), the tokens that were picked."""
        return self.turn >= 0

    def last(self) -> Tensor:
        """Return bool (S, N), the tokens that were picked in the last turn."""
        return self.turn == max(len(self.most) - 1, 0)


class Written(BaseModel):
    """What a recipe writes as a mapping; an unknown key is an error that names the known ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        for key in given if isinstance(given, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key '{key}'. {did_you_mean(str(key), cls.model_fields)}")
        return given


class Part(Written):
    """Base of all parts; a subclass is of one kind and adds parameters.

    places, modalities: where it may act and on what; of a pipeline it is what all its parts allow.
    known_count: given the budget, the number of survivors follows from the grid alone.
    main: the parameter that {name: value} gives, None where it has no such.
    why_more: what the warning says where it leaves clearly more than its budget, None where it never does.
    """

    kind: ClassVar[Kind]
    places: ClassVar[frozenset[Place]] = EVERYWHERE - {"cache"}
    modalities: ClassVar[frozenset[str]] = frozenset(MODALITIES)
    known_count: ClassVar[bool] = True
    main: ClassVar[str | None] = None
    why_more: ClassVar[str | None] = None

    def needs(self) -> tuple[Need, ...]:
        """Return the signals that it reads itself."""
        return ()

    def inside(self) -> tuple[Part, ...]:
        """Return the parts that it is made of."""
        return ()

    def every(self) -> Iterator[Part]:
        """Yield it and all parts inside it."""
        yield self
        for part in self.inside():
            yield from part.every()


class Score(Part):
    """A number per token; higher stays.

    -inf is for what is no piece of the picture, like a separator: it is kept last and never merged.
    """

    kind: ClassVar[Kind] = "score"

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return float32 (S, N); what padding holds does not matter, -inf is never kept while others are there."""
        raise NotImplementedError

    def row_needs(self) -> tuple[Need, ...]:
        """Return the signals that `choose_rows` reads, as they are at layer 0; none where it chooses no rows."""
        return ()

    def choose_rows(self, tokens: VisualTokens) -> Tensor:
        """Return bool (S, T), the words whose attention it reads; `tokens` hold the embeddings before layer 0."""
        raise NotImplementedError


class Segment(Part):
    """Groups of tokens: tiles, frames, windows, events, clusters.

    parts: the names of the halves that `Groups.part` tells apart, empty where there is one.
    """

    kind: ClassVar[Kind] = "segment"
    parts: ClassVar[tuple[str, ...]] = ()

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return the group of each token."""
        raise NotImplementedError


class Budget(Part):
    """How many tokens each group keeps.

    decides: where the step asks for no budget (`tokens.asked`) it says itself how many stay.
    """

    kind: ClassVar[Kind] = "budget"
    decides: ClassVar[bool] = False

    @property
    def scored(self) -> bool:
        """True where it cannot do without the score of the step."""
        return False

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count).

        score: float32 (S, N), None in a pipeline without one.
        """
        raise NotImplementedError

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span all groups keep together; only read where `known_count` holds."""
        return min(current, budget)


class Select(Part):
    """Which tokens are picked.

    decides: it does not look at the limit but says itself how many stay.
    grouped: it keeps the limit of each group; False works on whole spans only.
    scored: it cannot do without a score.
    """

    kind: ClassVar[Kind] = "select"
    decides: ClassVar[bool] = False
    grouped: ClassVar[bool] = True
    scored: ClassVar[bool] = False

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks.

        limit: int64 (S, groups.count), what each group may keep.
        """
        raise NotImplementedError

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span it picks, where the budget allots so many."""
        return min(current, budget)


class Merge(Part):
    """What becomes of the tokens that were not picked.

    picks: it picks the survivors itself, so that a pipeline has no `select`; it writes `pick_and_merge`.
    decides: where the step asks for no budget (`tokens.asked`) a merge that picks says itself how many stay.
    grouped: it merges within groups; False works on whole spans only.
    spare: how many tokens it leaves besides those that were picked, which pick so many less than the budget.
    """

    kind: ClassVar[Kind] = "merge"
    picks: ClassVar[bool] = False
    decides: ClassVar[bool] = False
    grouped: ClassVar[bool] = True
    spare: ClassVar[int] = 0

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return the reduction: survivors, and what goes into them."""
        raise NotImplementedError

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return the reduction of a merge that picks.

        limit: int64 (S, groups.count), what each group may keep.
        """
        raise NotImplementedError

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span a merge that picks leaves."""
        return min(current, budget)


def counts_as_asked(part: Part) -> bool:
    """Say whether a part of known count leaves what is asked for, to the token: it has no count of its own."""
    kind = next((kind for kind in (Budget, Select, Merge) if isinstance(part, kind)), None)
    return kind is None or type(part).count is kind.count  # type: ignore[attr-defined]


def _built(kind: Kind) -> BeforeValidator:
    def build(value: Any) -> Any:
        # Parts are looked up by name, and the registry knows them by their addresses only.
        from mllm_squeeze.registry import build_part

        return build_part(kind, value)

    return BeforeValidator(build)


P = TypeVar("P", bound=Part)
# Fields of a part or a pipeline that hold parts: written in YAML as a word, or as {name: {parameter: value}}.
AScore = Annotated[SerializeAsAny[Score], _built("score")]
ASegment = Annotated[SerializeAsAny[Segment], _built("segment")]
ABudget = Annotated[SerializeAsAny[Budget], _built("budget")]
ASelect = Annotated[SerializeAsAny[Select], _built("select")]
AMerge = Annotated[SerializeAsAny[Merge], _built("merge")]
