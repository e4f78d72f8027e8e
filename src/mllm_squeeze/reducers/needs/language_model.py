"""What is read in the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import INSIDE, Block, Heads, HeadsOfStates, Need, Place, Side, Whose


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
    places: ClassVar[frozenset[Place]] = INSIDE

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
    places: ClassVar[frozenset[Place]] = INSIDE

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
