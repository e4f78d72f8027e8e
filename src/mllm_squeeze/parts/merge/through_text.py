"""Removed tokens go into the complement that says the same of the words of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.reducers.base import Mix, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Embedding, Need

if TYPE_CHECKING:
    from torch import Tensor


class ThroughText(Merge):
    """Merge tokens into the survivors of the last turn of a selection, each into the most like it through the words.

    That is the sum over the words of the cosines of both to a word. It is done in rounds: a survivor that has taken up
    others is compared as what it has become. Separators are neither merged nor merged into. arXiv 2601.22674.

    space: "clip" is that of the text encoder that the user gives (`text_encoder=`, a CLIP), each of its tokens of the
        prompt by itself and patches by the projection alone; "llm" the language model's input space.
    rounds: how often tokens are shared out anew.
    weights: "added" adds the mean of the tokens of each round to a survivor, which grows by it; "mean" makes it the
        mean of itself and the tokens of the last round.
    """

    main: ClassVar[str | None] = "space"
    grouped: ClassVar[bool] = False

    space: Literal["clip", "llm"] = "clip"
    rounds: int = Field(default=3, ge=1)
    weights: Literal["added", "mean"] = "added"

    def needs(self) -> tuple[Need, ...]:
        """Return words and pictures in one space."""
        raw = self.space == "clip"
        return Embedding("visual", self.space, raw=raw), Embedding("text", self.space, raw=raw)

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return what goes into the survivors of the last turn."""
        x, text = (tokens[need] for need in self.needs())
        words = ops.with_vectors(text) if self.space == "clip" else tokens.words
        pieces = tokens.mask if score is None else tokens.mask & (score != -float("inf"))
        seeds, members = picks.last() & pieces, pieces & ~picks.keep
        slots = min(x.shape[1], picks.most[-1]) if picks.most else x.shape[1]
        entries = ops.entries_through_text(
            x, text, words, seeds, members, max(1, slots), self.rounds, self.weights == "added"
        )
        return Reduction(picks.keep, mix=Mix(*entries))
