"""Words and visual tokens as they entered the language model, kept from layer 0 for a cut behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.source import Reading, Source, Spot
from mllm_squeeze.family.structure import ModelParts


@dataclass(frozen=True)
class EmbeddingSource(Source):
    """Keeps what layer 0 gets ahead of any cut."""

    def spot(self, parts: ModelParts) -> Spot | None:
        """None: it is handed over in front of layer 0."""
        return None

    def take(self, prefill: Prefill, given: Any) -> Reading | None:
        """Return (B, T, D)."""
        return Reading(given.detach(), prefill.index)
