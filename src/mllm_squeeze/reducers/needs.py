"""What a rule may read: one frozen type per kind of signal. The need itself is the key under which its signal arrives.

S is spans, N visual tokens of the longest span, T words of the longest prompt behind its first visual token, M tokens
of all kinds that were there when it was read (`VisualTokens.among` says which of them are the visual ones), H heads, d
channels of a head, D channels of a state. All is computed from queries, keys and states in blocks: no attention map is
kept, and every attention implementation gives the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

Place = Literal["encoder", "projector", "layer", "cache"]
Side = Literal["visual", "text"]
Whose = Literal["visual", "text", "all"]
Block = int | Literal["next"]
EncoderBlock = int | float | Literal["feature"]
Heads = Literal["mean", "sum", "max", "each"]
HeadsOfStates = Literal["concat", "mean", "each"]

EVERYWHERE: frozenset[Place] = frozenset({"encoder", "projector", "layer", "cache"})
_BEHIND_TOWER: frozenset[Place] = frozenset({"projector", "layer"})
_INSIDE: frozenset[Place] = frozenset({"encoder", "layer"})


@dataclass(frozen=True)
class Need:
    """Base of all signals.

    places: where a rule that reads it may act.
    phrase: what it is, in messages.
    """

    places: ClassVar[frozenset[Place]] = EVERYWHERE
    phrase: ClassVar[str]

    @property
    def name(self) -> str:
        """Its name, which several needs may share: "encoder_attention", or "projection.text" of the words."""
        word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        of = getattr(self, "of", "visual")
        return word if of == "visual" else f"{word}.{of}"

    @property
    def reads_text(self) -> bool:
        """True where the signal depends on the words of the prompt."""
        return getattr(self, "of", "visual") != "visual"

    @property
    def reads_encoder(self) -> bool:
        """True where the signal comes from inside the vision encoder and is carried to the tokens that the LLM gets."""
        return False

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


@dataclass(frozen=True)
class Features(Need):
    """States at the place of the cut, (S, N, D), or (S, T, D) of the words.

    of: whose states.
    """

    phrase: ClassVar[str] = "the visual tokens' states"

    of: Side = "visual"


@dataclass(frozen=True)
class Attention(Need):
    """Attention that tokens receive from chosen rows of the language model, softmax over all keys, float32 (S, N).

    block: -1 is the layer before the cut, -2 the one before that, 0 and up the layer of that number, "next" previews
        the layer behind the cut: its norm, projections and rotary embedding on the states of now.
    rows: "last" the last prompt token, "text" the prompt behind its first visual token, "visual" the visual tokens of
        the span, "all" every token that sees the key, "chosen" the words that `Reducer.choose_rows` picks.
    heads: how heads are joined; "each" leaves an axis: (S, H, N).
    over_rows: how rows are joined; "each" leaves an axis in front of the last: (S, R, N), or (S, H, R, N), where R is T
        or N, zero where there is no row.
    columns: whose keys are looked at, the visual tokens' or the words': (S, T).
    """

    phrase: ClassVar[str] = "the attention of the language model"
    places: ClassVar[frozenset[Place]] = frozenset({"layer"})

    block: Block = -1
    rows: Literal["last", "text", "visual", "all", "chosen"] = "last"
    heads: Heads = "mean"
    over_rows: Heads = "mean"
    columns: Side = "visual"

    @property
    def reads_text(self) -> bool:
        """True unless only visual tokens look at visual tokens."""
        return self.rows != "visual" or self.columns == "text"


@dataclass(frozen=True)
class Projection(Need):
    """Queries, keys or values of a block: (S, N, H * d), (S, N, d) or (S, N, H, d); keys and values have Hkv heads.

    At a layer the block is one of the language model, in the encoder one of the encoder.

    what: which of them.
    of: whose, (S, T, ...) of the words, (S, M, ...) of all tokens, those in front of the pictures included.
    block: as in `Attention`.
    rope: behind the rotary embedding and the norms of the heads, or as the projection gives them.
    heads: side by side, their mean, or an axis of their own.
    """

    phrase: ClassVar[str] = "the queries, keys or values of a block"
    places: ClassVar[frozenset[Place]] = _INSIDE

    what: Literal["query", "key", "value"] = "key"
    of: Whose = "visual"
    block: Block = -1
    rope: bool = True
    heads: HeadsOfStates = "concat"


@dataclass(frozen=True)
class States(Need):
    """States inside a block of the language model, or of the encoder: (S, N, D), (S, T, D) or (S, M, D).

    where: "in" what the block gets, "attention_in" and "mlp_in" behind the norms, "attention_out" and "mlp_out" what is
        added to the stream, "gate" the activations of the MLP in front of its last projection.
    of: whose, of the visual tokens, the words, or all tokens.
    block: a number of its own, or counted back from the cut, as in `Attention`; not "next".
    """

    phrase: ClassVar[str] = "the states inside a block"
    places: ClassVar[frozenset[Place]] = _INSIDE

    where: Literal["in", "attention_in", "attention_out", "mlp_in", "mlp_out", "gate"] = "in"
    of: Whose = "visual"
    block: int = -1


@dataclass(frozen=True)
class Rotary(Need):
    """Cosines and then sines of the angles by which a block turns the channels of a head, float32 (S, N, 2 * d).

    The product of two such vectors is that of a query and a key that are all ones, at the places of the two tokens.
    Channels that are not turned have the angle 0.

    of: whose, (S, T, 2 * d) of the words.
    block: a number of its own, or counted back from the cut, as in `Attention`; not "next".
    """

    phrase: ClassVar[str] = "the rotary angles of a block"
    places: ClassVar[frozenset[Place]] = frozenset({"layer"})

    of: Side = "visual"
    block: int = -1

    @property
    def reads_text(self) -> bool:
        """False: where words stand does not depend on what they say."""
        return False


@dataclass(frozen=True)
class Normed(Need):
    """States at the place of the cut behind the final norm of the language model, (S, N, D) or (S, T, D).

    of: whose states.
    """

    phrase: ClassVar[str] = "normed states of the language model"
    places: ClassVar[frozenset[Place]] = frozenset({"layer"})

    of: Side = "visual"


@dataclass(frozen=True)
class EncoderNeed(Need):
    """Base of what is read inside the vision encoder and carried to the tokens that the LLM gets."""

    places: ClassVar[frozenset[Place]] = _BEHIND_TOWER

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
        receive more than `factor` times the average themselves, over all where there is none.
    heads: how heads are joined, behind the sum over rows; "each" leaves an axis: (S, H, N).
    factor: of outliers.
    """

    phrase: ClassVar[str] = "the attention of the vision encoder"

    block: EncoderBlock = "feature"
    rows: Literal["cls", "all", "cls_or_all", "probe", "outliers"] = "cls_or_all"
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
class Size(Need):
    """How many tokens each one stands for by now, itself included, float32 (S, N).

    Patches in the encoder, visual tokens of the prompt behind it.
    """

    phrase: ClassVar[str] = "how many tokens were merged"


@dataclass(frozen=True)
class Embedding(Need):
    """Words or pictures in a space that both share: (S, T, D) of the words, (S, N, D) of the visual tokens.

    of: which of them.
    space: "llm" is the language model's input space, as at layer 0; "clip" is that of the text encoder which the user
        gives (`text_encoder=`), float32: (S, 1, D) for the pooled words behind the first visual token, zeros where
        there are none, and for each visual token what its patches become by the encoder's projection of the states that
        the vision tower gives, separators 0. Where none is given the LLM's own space stands in if `fallback` says so,
        and the report tells.
    fallback: whether the LLM's own space may stand in.
    pooled: the one vector of the picture or frame that a visual token is of, the same for each token of its tile, as
        its encoder compares pictures with texts: that of the CLS token, or what the pooling head makes of all patches,
        on the states that the vision tower gives. In the space "clip" only.
    """

    phrase: ClassVar[str] = "words and pictures in one space"
    places: ClassVar[frozenset[Place]] = _BEHIND_TOWER

    of: Side = "text"
    space: Literal["llm", "clip"] = "llm"
    fallback: bool = False
    pooled: bool = False

    @property
    def reads_text(self) -> bool:
        """True for the words."""
        return self.of == "text"
