"""How alike a token is to the words of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Embedding, Features, Need, Side

if TYPE_CHECKING:
    from torch import Tensor


class TextSimilarity(Score):
    """Score a token by its cosine to the words behind the first visual token, in float32.

    space: "features" compares the states at the place of the cut, "llm" the language model's input space, "clip" the
        space of the text encoder that the user gives (`text_encoder=`), where the words are one vector.
    over: the words are joined by their largest or their mean cosine; "pooled" is the cosine to their mean.
    measure: "dot" takes the dot product instead of the cosine.
    sign: -1 keeps what is least alike.
    fallback: whether the language model's own space may stand in where no text encoder is given.
    raw: in the space of the text encoder (a CLIP) each of its tokens of the prompt by itself, and patches by the
        projection alone, without the norm in front; separators get -inf. In other spaces it changes nothing.
    of: "tokens" compares each token, "pictures" the one vector of the picture or frame that it is of, the same for all
        of them, as the encoder itself compares pictures with texts; in the space "clip" only, without a stand-in.
    """

    main: ClassVar[str | None] = "space"

    space: Literal["features", "llm", "clip"] = "features"
    over: Literal["max", "mean", "pooled"] = "max"
    measure: Literal["cosine", "dot"] = "cosine"
    sign: Literal[1, -1] = 1
    fallback: bool = False
    raw: bool = False
    of: Literal["tokens", "pictures"] = "tokens"

    @model_validator(mode="after")
    def _possible(self) -> TextSimilarity:
        if self.raw and self.fallback:
            raise ValueError(
                "raw: true says how a text encoder is used, and fallback: true that none need be given; write one of "
                "them, or space: llm"
            )
        if self.of == "pictures" and (self.space != "clip" or self.fallback):
            raise ValueError("of: pictures takes space: clip, and no fallback; whole pictures have no vector elsewhere")
        if self.of == "pictures" and self.raw:
            raise ValueError("raw: true compares single words with patches, and of: pictures whole pictures; write one")
        return self

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors of both sides."""
        return self._side("visual"), self._side("text")

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the similarity to the words; to the one pooled prompt where the space has but one vector."""
        visual, text = (tokens[need] for need in self.needs())
        words = tokens.words
        if self.raw and self.space == "clip":
            alike = ops.text_similarity(visual, text, ops.with_vectors(text), self.over, self.measure == "cosine")
            return (alike * self.sign).masked_fill((visual == 0).all(-1), -float("inf"))
        if text.shape[1] == 1 and words.shape[1] != 1:
            words = words.any(1, keepdim=True)
        return ops.text_similarity(visual, text, words, self.over, self.measure == "cosine") * self.sign

    def _side(self, of: Side) -> Need:
        if self.space == "features":
            return Features(of)
        pooled = of == "visual" and self.of == "pictures"
        return Embedding(of, self.space, self.fallback, raw=self.raw and self.space == "clip", pooled=pooled)
