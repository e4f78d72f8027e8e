"""The words of a prompt in the space of the text encoder that the user gives: one vector, or one for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.source import Found, Reading, Source, Spot
from mllm_squeeze.engine.text_encoder import PromptEncoder
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.reducers.needs import Embedding


@dataclass(frozen=True)
class PromptVectorSource(Source):
    """Encodes the words once, in front of layer 0.

    encoder: what the user gave.
    """

    encoder: PromptEncoder | None = None

    def spot(self, parts: ModelParts) -> Spot | None:
        """None: words are no part of what the layers get."""
        return None

    def take(self, prefill: Prefill, given: Any) -> Reading | None:
        """Return (B, 1, D), or (B, M, D) where each token of the text encoder is wanted by itself.

        Raises:
            UnsupportedInputError: the prompt came without ids.
        """
        assert self.encoder is not None
        if prefill.ids is None:
            raise UnsupportedInputError(
                "The method compares the words of the prompt by a text encoder, and this prompt came as embeddings. "
                "Call the model with input_ids."
            )
        # The words themselves are wanted, so the ids have to come to the host.
        words = self.encoder.words(prefill.ids.cpu(), prefill.layout)
        raw = isinstance(self.need, Embedding) and self.need.raw
        return Reading(self.encoder.encode_each(words) if raw else self.encoder.encode(words))

    def answer(self, prefill: Prefill, reading: Reading, found: Found, side: str) -> Tensor:
        """Return (S, 1, D) or (S, M, D), the vectors of each span's prompt."""
        return reading.values[found.table.sample.to(reading.values.device)]
