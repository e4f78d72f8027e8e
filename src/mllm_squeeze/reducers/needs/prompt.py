"""What is known of the prompt and of its tokens, whatever model reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import BEHIND_TOWER, Need, Place, Side


@dataclass(frozen=True)
class Runs(Need):
    """Which unbroken run of the prompt each token stands in, int64 (S, N), counted from 0 for each span."""

    phrase: ClassVar[str] = "the runs of the prompt"
    places: ClassVar[frozenset[Place]] = BEHIND_TOWER


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
    raw: in the space of the text encoder each of its tokens of the prompt by itself, (S, M, D), zeros where there is
        none, and patches by the projection alone, without the norm in front, so that a sum stays a sum.
    pooled: the one vector of the picture or frame that a visual token is of, the same for each token of its tile, as
        its encoder compares pictures with texts: that of the CLS token, or what the pooling head makes of all patches,
        on the states that the vision tower gives. In the space "clip" only.
    """

    phrase: ClassVar[str] = "words and pictures in one space"
    places: ClassVar[frozenset[Place]] = BEHIND_TOWER

    of: Side = "text"
    space: Literal["llm", "clip"] = "llm"
    fallback: bool = False
    raw: bool = False
    pooled: bool = False

    @property
    def reads_text(self) -> bool:
        """True for the words."""
        return self.of == "text"
