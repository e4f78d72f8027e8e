"""What a reducer is: typed parameters, the signals it needs, and one pure function `reduce`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mllm_squeeze.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile

Place = Literal["encoder", "projector", "layer", "cache"]


# Names of the signals that the vision encoder gives.
ENCODER_SIGNALS = ("saliency", "encoder_keys")


@dataclass(frozen=True)
class Need:
    """One signal that a reducer asks the engine for; it arrives as `VisualTokens.signals[need]`.

    name: one of "attention"     float32 (S, N): attention that each visual token receives from chosen prompt rows,
    mean over heads and rows. `rows`: "last" (last prompt token), "text" (all prompt tokens after the first visual
    one), "chosen" (rows picked by `Reducer.choose_rows`). `source`: "current" reads the layer before the cut, "next"
    previews the projections of the layer behind it. "keys"          (S, N, Hkv * d): keys of the layer before the cut,
    after rotary embedding, heads concatenated; also `TextTokens.keys`. In the encoder: (S, N, d), mean over the heads.
    "normed"        (S, N, D): features after the final norm of the language model; also `TextTokens.normed`.
    "saliency"      float32 (S, N): what the vision encoder attends to, summed over heads: the CLS row of the feature
    layer where there is a CLS token, else attention received from all tokens. Separators have -inf. "encoder_keys"
    (S, N, d): keys of that encoder layer, mean over heads. "size"          float32 (S, N): how many tokens each one
    stands for by now, itself included: patches in the encoder, visual tokens of the prompt behind it.
    """

    name: Literal["attention", "keys", "normed", "saliency", "encoder_keys", "size"]
    rows: Literal["last", "text", "chosen"] = "last"
    source: Literal["current", "next"] = "current"


class Signals(dict["Need | str", "Tensor"]):
    """Signals by the `Need` that asked for them, and by its name where no other need has it."""

    def __init__(self, found: Mapping[Need, Tensor]) -> None:
        names = [need.name for need in found]
        super().__init__()
        for need, value in found.items():
            self[need] = value
            if names.count(need.name) == 1:
                self[need.name] = value

    def __missing__(self, key: Need | str) -> Tensor:
        needs = ", ".join(str(need) for need in self if isinstance(need, Need)) or "none"
        raise ConfigError(
            f"No signal '{key}' is there under that key; there are: {needs}. Name the need in `needs`, and read "
            "tokens.signals[need] where several needs have one name."
        )


@dataclass(frozen=True)
class TextTokens:
    """The text of each span's sample that follows its first visual token.

    features: (S, T, D). mask: bool (S, T). keys, normed: as in `Need`, None unless asked for.
    """

    features: Tensor
    mask: Tensor
    keys: Tensor | None = None
    normed: Tensor | None = None


@dataclass(frozen=True)
class VisualTokens:
    """What a reducer sees: the visual tokens of all spans of a batch, padded to the longest span.

    features: (S, N, D), the hidden states at the place of the cut. mask: bool (S, N), False is padding. budget: int64
    (S,), tokens to keep, on the device; `counts` are the same numbers on the host. current: tokens of each span that
    are there now, on the host. grid: int64 (S, N, 4), (tile, t, h, w) of each token, -1 for separators, padding and
    where the grid is unknown. origin: int64 (S, N), place of each token in its span before any cut. lengths: tokens per
    span before any cut, without those that the attention mask hides. tiles: the rectangles of each span. lead: special
    tokens of the encoder before the patches (1 with a CLS token). signals: by `Need`, see there; by its name where one
    need has it. text: None unless the reducer reads the text.
    """

    features: Tensor
    mask: Tensor
    budget: Tensor
    counts: tuple[int, ...]
    grid: Tensor
    origin: Tensor
    lengths: tuple[int, ...]
    current: tuple[int, ...] = ()
    tiles: tuple[tuple[Tile, ...], ...] = ()
    lead: int = 0
    signals: Mapping[Any, Tensor] = field(default_factory=dict)
    text: TextTokens | None = None


@dataclass(frozen=True)
class Reduction:
    """What a reducer returns.

    keep: bool (S, N), True for survivors. assign: int64 (S, N) or None: the survivor (index into N) that each token is
    merged into; survivors point at themselves, -1 is dropped for good. weights: float32 (S, N) or None: the new state
    of a survivor is the sum of weight * state over the tokens assigned to it; None takes the plain mean.
    """

    keep: Tensor
    assign: Tensor | None = None
    weights: Tensor | None = None


class Reducer(BaseModel):
    """Base of all reducers; a subclass adds parameters and writes `reduce`.

    places: where it may act. known_count: the number of survivors follows from the grid and the budget alone. decides:
    without a budget the rule itself says how many tokens stay; its budget is then all that is there, and the survivors
    are counted. Every other reducer needs a budget. reads_text: the choice depends on the prompt's text. merges:
    survivors carry what was assigned to them. why_more: what the warning says where the rule leaves clearly more than
    its budget. `ratio` is the fraction of the visual tokens removed, `keep` the other way to say it: an int is tokens
    kept per span, a float the fraction kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    places: ClassVar[frozenset[Place]]
    known_count: ClassVar[bool] = True
    decides: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video", "audio"})
    why_more: ClassVar[str] = "its rule cannot remove more of such an input"

    ratio: float | None = Field(default=None, ge=0, lt=1)
    keep: int | float | None = Field(default=None)
    separators: Literal["compete", "keep", "drop"] = "compete"

    @model_validator(mode="after")
    def _one_budget(self) -> Reducer:
        if self.ratio is not None and self.keep is not None:
            raise ValueError("give ratio (fraction removed) or keep (tokens or fraction kept), not both")
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise ValueError(f"keep as a float is the fraction kept, between 0 and 1; got {self.keep}")
        if isinstance(self.keep, int) and self.keep < 1:
            raise ValueError(f"keep as an int is the number of tokens kept per span, at least 1; got {self.keep}")
        return self

    def needs(self) -> tuple[Need, ...]:
        """Return the signals that `reduce` reads."""
        return ()

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return how many tokens of one span `reduce` will keep; only read where `known_count` holds."""
        return min(current, budget)

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

    def refresh(self, row: Tensor, previous: Tensor | None, kept: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept, stored): bool (B, V), what later layers see in this step, and what to hand in at the next.

        row: float32 (B, V), attention of the new token. previous, kept: of the step before, None at the first. mask:
        bool (B, V), False is no visual entry.
        """
        raise NotImplementedError
