"""What a reducer is: typed parameters, the signals it needs, and one pure function `reduce`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile

Modality = Literal["image", "video", "audio"]
MODALITIES = ("image", "video", "audio")


class Signals(dict[Need, "Tensor"]):
    """Signals by the need that asked for them."""

    def __missing__(self, need: Need) -> Tensor:
        there = ", ".join(str(other) for other in self) or "none"
        raise ConfigError(f"The signal {need} was not asked for; there are: {there}. Name it in `needs`.")


@dataclass(frozen=True)
class Among:
    """The tokens of all kinds that were there when a signal was read, M of them.

    present: bool (S, M), False at padding. place: int64 (S, N), where each visual token stood.
    """

    present: Tensor
    place: Tensor


@dataclass(frozen=True)
class VisualTokens:
    """What a reducer sees: the visual tokens of all spans of a batch, padded to the longest span.

    mask: bool (S, N), False is padding.
    budget: int64 (S,), tokens to keep, on the device; `counts` are the same numbers on the host.
    history: for each span its tokens before the first cut by the same rule, and behind each such cut by now, on the
        host; empty in front of the first one.
    depth: layers of the language model, 0 where that is not known.
    asked: False where the step has no budget, so that a rule that can decides how many stay; `budget` is then all.
    current: tokens of each span that are there now, on the host.
    grid: int64 (S, N, 4), (tile, t, h, w) of each token, -1 for separators, padding and where the grid is unknown.
    origin: int64 (S, N), place of each token in its span before any cut.
    lengths: tokens per span before any cut, without those that the attention mask hides.
    tiles: the rectangles of each span.
    special_tokens: special tokens of the encoder before the patches (1 with a CLS token), which `mask` does not hold.
    sample: the row of the batch that each span stands in, on the host.
    modality: "image", "video" or "audio", of each span.
    links: for each span the numbers of the other spans of its sample, in the order of the prompt.
    signals: by `Need`; `tokens[need]` is the same.
    text_mask: bool (S, T), the words behind the first visual token of each span's sample; None where no need
        reads text.
    among: by need that speaks of all tokens, where the visual ones stand among them.
    """

    mask: Tensor
    budget: Tensor
    counts: tuple[int, ...]
    grid: Tensor
    origin: Tensor
    lengths: tuple[int, ...]
    current: tuple[int, ...] = ()
    tiles: tuple[tuple[Tile, ...], ...] = ()
    special_tokens: int = 0
    sample: tuple[int, ...] = ()
    modality: tuple[str, ...] = ()
    links: tuple[tuple[int, ...], ...] = ()
    signals: Mapping[Need, Tensor] = field(default_factory=Signals)
    text_mask: Tensor | None = None
    among: Mapping[Need, Among] = field(default_factory=dict)
    asked: bool = True
    history: tuple[tuple[int, ...], ...] = ()
    depth: int = 0

    def __getitem__(self, need: Need) -> Tensor:
        return self.signals[need]

    @property
    def features(self) -> Tensor:
        """The states (S, N, D) at the place of the cut, where `Features()` was asked for."""
        return self.signals[Features()]

    @property
    def words(self) -> Tensor:
        """The mask bool (S, T) of the words, where a need reads text."""
        if self.text_mask is None:
            raise ConfigError("No need of this rule reads the text, so there are no words. Name one in `needs`.")
        return self.text_mask


@dataclass(frozen=True)
class Mix:
    """Which removed tokens go into which survivors, where one token goes into several: entries of a sparse matrix.

    span, into, source: int64 (E,), row of the batch, survivor and token; a survivor's own entry has into == source.
    weight: float32 (E,), the new state of a survivor is the sum of weight * state over its entries.
    giving: int64 (E,), the row of the source where it may be another than that of the survivor, None where it never is.
    """

    span: Tensor
    into: Tensor
    source: Tensor
    weight: Tensor
    giving: Tensor | None = None

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Span, into, source, weight and giving."""
        return self.span, self.into, self.source, self.weight, self.giving


@dataclass(frozen=True)
class Reduction:
    """What a reducer returns.

    keep: bool (S, N), True for survivors.
    assign: int64 (S, N) or None: the survivor (index into N) that each token is merged into; survivors point at
        themselves, -1 is dropped for good.
    weights: float32 (S, N) or None: the new state of a survivor is the sum of weight * state over the tokens assigned
        to it; None takes the plain mean.
    mix: instead of assign and weights, where one token goes into several survivors; survivors without an entry stay as
        they are.
    """

    keep: Tensor
    assign: Tensor | None = None
    weights: Tensor | None = None
    mix: Mix | None = None

    @property
    def merges(self) -> bool:
        """True where survivors may get other states than they had."""
        return self.assign is not None or self.mix is not None

    def states(self, x: Tensor) -> Tensor:
        """Return (S, N, D), x (S, N, D) with merged states in the places of those that something goes into."""
        if self.mix is not None:
            return ops.mix_tokens(x, *self.mix.entries)
        if self.assign is None:
            return x
        return ops.merge_tokens(x, self.assign, ops.mean_weights(self.assign) if self.weights is None else self.weights)

    def sizes(self, size: Tensor) -> Tensor:
        """Return float32 (S, N), what each token stands for, from what each stood for before (S, N)."""
        if self.mix is not None:
            return ops.mixed_size(size, *self.mix.entries)
        return size if self.assign is None else ops.merged_size(self.assign, size)

    def targets(self) -> Tensor:
        """Return int64 (S, N), the survivor that each token goes into most: itself for survivors, -1 for dropped."""
        if self.mix is not None:
            return ops.strongest_target(self.keep, *self.mix.entries)
        if self.assign is not None:
            return self.assign
        return ops.positions(self.keep).where(self.keep, -1)


@dataclass(frozen=True)
class Facts:
    """What tools, tests and serving engines ask of a rule.

    places: where it may act.
    known_count: the number of survivors follows from the grid and the budget alone.
    exact: it leaves as many tokens of a span as the budget says, of every input; False where that is not known.
    decides: without a budget the rule itself says how many tokens stay.
    merges: survivors may get other states than they had.
    reads_text: the choice depends on the prompt's text.
    modalities: what it reduces.
    why_more: what the warning says where the rule leaves clearly more than its budget.
    """

    places: frozenset[Place]
    known_count: bool
    exact: bool
    decides: bool
    merges: bool
    reads_text: bool
    modalities: frozenset[str]
    why_more: str = "its rule cannot remove more of such an input"


class Reducer(BaseModel):
    """Base of all reducers; a subclass adds parameters and writes `reduce`.

    places, known_count, decides, merges, modalities: as in `Facts`; whether it reads the text follows from its needs.
    why_more: what messages say where the rule leaves clearly more than its budget.
    least: the fraction of the tokens that it leaves at least, whatever the budget.
    separators: tokens that stand for no piece of a picture compete with the others, are all kept, or all dropped.
    modality: what it reduces of what it could, a word or several, None for all of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    places: ClassVar[frozenset[Place]]
    known_count: ClassVar[bool] = True
    decides: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    modalities: ClassVar[frozenset[str]] = frozenset(MODALITIES)
    why_more: ClassVar[str] = "its rule cannot remove more of such an input"
    least: ClassVar[float] = 0.0

    separators: Literal["compete", "keep", "drop"] = "compete"
    modality: Modality | tuple[Modality, ...] | None = None

    def of_its_modality(self, modalities: frozenset[str]) -> frozenset[str]:
        """Return what it reduces, of what it could."""
        named = (self.modality,) if isinstance(self.modality, str) else self.modality
        return modalities if named is None else modalities & frozenset(named)

    @property
    def facts(self) -> Facts:
        """What is known of the rule without running it."""
        return Facts(
            self.places,
            self.known_count,
            self.known_count and type(self).count is Reducer.count,
            self.decides,
            self.merges,
            any(need.reads_text for need in self.needs()),
            self.of_its_modality(self.modalities),
            self.why_more,
        )

    def needs(self) -> tuple[Need, ...]:
        """Return the signals that `reduce` reads."""
        return ()

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span `reduce` will keep; only read where `known_count` holds."""
        return min(current, budget)

    def fewest(self, current: int, tiles: tuple[Tile, ...]) -> int:
        """Return the fewest tokens of one span that `reduce` can leave, where the budget is a number of tokens."""
        return 1

    def row_needs(self) -> tuple[Need, ...]:
        """Return the signals that `choose_rows` reads, as they are at layer 0."""
        return (Features(), Features(of="text"))

    def choose_rows(self, tokens: VisualTokens) -> Tensor:
        """Return bool (S, T), the text rows whose attention is read; `tokens` hold the embeddings before layer 0."""
        raise NotImplementedError(f"{type(self).__name__} asks for chosen rows but does not choose them")

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return which tokens survive; pure, batched, without device-to-host sync when `known_count` holds."""
        raise NotImplementedError


class DecodeReducer(Reducer):
    """Base of reducers that act while decoding: step by step, on the entries of the cache, from `layer` on.

    The attention of layer - 1 is read in each step; the layers from `layer` on attend to what `refresh` keeps. Nothing
    is freed, so entries can come back.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"cache"})

    layer: int = Field(default=3, ge=1)

    @property
    def facts(self) -> Facts:
        """As of any reducer; what a new token attends to depends on the words."""
        return replace(super().facts, reads_text=True)

    def refresh(self, row: Tensor, previous: Tensor | None, kept: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept, stored): bool (B, V), what later layers see in this step, and what to hand in at the next.

        row: float32 (B, V), attention of the new token. previous, kept: of the step before, None at the first. mask:
        bool (B, V), False is no visual entry.
        """
        raise NotImplementedError
