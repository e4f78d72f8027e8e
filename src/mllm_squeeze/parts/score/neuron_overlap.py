"""How many neurons of the MLP are active for a token and for the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, States

if TYPE_CHECKING:
    from torch import Tensor


class NeuronOverlap(Score):
    """Score a token by how many neurons of the MLP before the cut are active for it, of those that a core holds.

    arXiv 2505.19235. A neuron is active where what it gives to the last projection of the MLP is above 0. Memory
    O((tokens + words) * neurons).

    core: "word" is what is active for one word; "frequency" the neurons that are active for most visual tokens of the
        span and words behind the picture.
    word: which one, counted back from the last word of the prompt.
    share: of all neurons, that are the core.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    main: ClassVar[str | None] = "core"

    core: Literal["word", "frequency"] = "frequency"
    word: int = Field(default=-5, le=-1)
    share: float = Field(default=0.4, gt=0, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the activations of tokens and of words."""
        return States("gate"), States("gate", of="text")

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return how many neurons are shared."""
        visual, text = (tokens[need] for need in self.needs())
        if self.core == "word":
            return ops.shared_with_word(visual, text, tokens.words, self.word)
        return ops.shared_with_core(visual, tokens.mask, text, tokens.words, self.share)
