"""What is read in the encoders of pictures and sound, and carried to the tokens that the LLM gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import BEHIND_TOWER, EncoderBlock, Heads, HeadsOfStates, Need, Place


@dataclass(frozen=True)
class EncoderNeed(Need):
    """Base of what is read inside the vision encoder and carried to the tokens that the LLM gets."""

    places: ClassVar[frozenset[Place]] = BEHIND_TOWER

    @property
    def reads_encoder(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class EncoderAttention(EncoderNeed):
    """Attention that patches receive in a block of the vision encoder, float32 (S, N); separators have -inf.

    block: "feature" is the layer whose output the projector gets; without a CLS token it is the last one that sees the
        whole picture where others see windows, else the second to last. A number counts from the first block, a
        negative one from the last; a fraction (a float between 0 and 1) is of the depth, rounded down.
    rows: "cls" the row of the CLS token, "all" the sum over all rows that see the key, "cls_or_all" the first where the
        encoder has a CLS token, else the second, "probe" the pooling head's query, on the states that the block gives,
        where the tower, or the text encoder that is given, has such a head, "outliers" the mean over those tokens that
        receive more than `factor` times the average themselves, over all where there is none; "others" the sum over all
        patches but the key's own, without the CLS token.
    heads: how heads are joined, behind the sum over rows; "each" leaves an axis: (S, H, N).
    factor: of outliers.
    """

    phrase: ClassVar[str] = "the attention of the vision encoder"

    block: EncoderBlock = "feature"
    rows: Literal["cls", "all", "cls_or_all", "probe", "outliers", "others"] = "cls_or_all"
    heads: Heads = "sum"
    factor: float = 0.0


@dataclass(frozen=True)
class EncoderProjection(EncoderNeed):
    """Queries, keys or values of a block of the vision encoder: (S, N, d), (S, N, H * d) or (S, N, H, d); separators 0.

    what: which of them.
    block: as in `EncoderAttention`.
    heads: their mean, side by side, or an axis of their own.
    cls: the one vector of the CLS token instead, the same for each token of its tile.
    """

    phrase: ClassVar[str] = "the keys of the vision encoder"

    what: Literal["query", "key", "value"] = "key"
    block: EncoderBlock = "feature"
    heads: HeadsOfStates = "mean"
    cls: bool = False


@dataclass(frozen=True)
class EncoderStates(EncoderNeed):
    """Output states of a block of the vision encoder, (S, N, D); separators 0.

    block: as in `EncoderAttention`, but "feature" is always the layer whose output the projector gets.
    cls: the state of the CLS token instead, the same for each token of its tile.
    """

    phrase: ClassVar[str] = "the states of the vision encoder"

    block: EncoderBlock = "feature"
    cls: bool = False


@dataclass(frozen=True)
class Sensitivity(EncoderNeed):
    """How far the projector's output moves where its input is pushed, float32 (S, N); separators have -inf.

    |f(x + step * u) - f(x - step * u)| / (2 * step), mean over random unit vectors u, the same for all tokens.

    directions: how many vectors, each two runs of the projector.
    step: how far.
    seed: of the vectors.
    """

    phrase: ClassVar[str] = "how the projector answers to pushes"
    directions: int = 64
    step: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class SoundAttention(Need):
    """Attention that tokens receive in the last block of the audio encoder, float32 (S, N); 0 for what is no sound.

    The mean over heads and queries, softmax over all the sound of a prompt, whatever windows the block itself looks at.
    """

    phrase: ClassVar[str] = "the attention of the audio encoder"
    places: ClassVar[frozenset[Place]] = BEHIND_TOWER
