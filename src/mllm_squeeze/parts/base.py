"""What a part is: typed parameters around one pure function, of one of five kinds.

A pipeline runs them in this order: `Segment` puts tokens into groups, `Score` gives each token a number, `Budget` says
how many each group keeps, `Select` picks them, `Merge` says what becomes of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny

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
        there is one part only.
    """

    label: Tensor
    count: int
    part: Tensor | None = None


@dataclass(frozen=True)
class Picks:
    """Which tokens were picked, and when.

    turn: int64 (S, N), the turn of a selection in which a token was picked, from 0; -1 where it was not.
    """

    turn: Tensor

    @property
    def keep(self) -> Tensor:
        """Bool (S, N), the tokens that were picked."""
        return self.turn >= 0


class Part(BaseModel):
    """Base of all parts; a subclass is of one kind and adds parameters.

    places, modalities: where it may act and on what; of a pipeline it is what all its parts allow.
    known_count: given the budget, the number of survivors follows from the grid alone.
    main: the parameter that {name: value} gives, None where it has no such.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[Kind]
    places: ClassVar[frozenset[Place]] = EVERYWHERE - {"cache"}
    modalities: ClassVar[frozenset[str]] = frozenset(MODALITIES)
    known_count: ClassVar[bool] = True
    main: ClassVar[str | None] = None

    def needs(self) -> tuple[Need, ...]:
        """Return the signals that it reads, those of the parts inside it included."""
        return ()


class Score(Part):
    """A number per token; higher stays."""

    kind: ClassVar[Kind] = "score"

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return float32 (S, N); what padding holds does not matter, -inf is never kept while others are there."""
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

    decides: it does not look at `tokens.budget` but says itself how many stay.
    """

    kind: ClassVar[Kind] = "budget"
    decides: ClassVar[bool] = False

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
    """

    kind: ClassVar[Kind] = "select"
    decides: ClassVar[bool] = False

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks.

        limit: int64 (S, groups.count), what each group may keep.
        """
        raise NotImplementedError

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span it picks, where the budget allots so many."""
        return min(current, budget)


class Merge(Part):
    """What becomes of the tokens that were not picked."""

    kind: ClassVar[Kind] = "merge"

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return the reduction: survivors, and what goes into them."""
        raise NotImplementedError


def counts_as_asked(part: Part) -> bool:
    """Say whether a part of known count leaves what is asked for, to the token: it has no count of its own."""
    kind = next((kind for kind in (Budget, Select) if isinstance(part, kind)), None)
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
