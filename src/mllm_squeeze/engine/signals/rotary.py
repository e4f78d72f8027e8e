"""The angles by which a layer turns the queries and keys of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.source import Reading, Source, Spot
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.upstream.rope import angles, head_width


@dataclass(frozen=True)
class RotarySource(Source):
    """Reads the rotary tables that a layer is given."""

    def spot(self, parts: ModelParts) -> Spot | None:
        """None: they are handed over in front of the layer."""
        return None

    def take(self, prefill: Prefill, given: Any) -> Reading | None:
        """Return (B, M, 2 * d).

        Raises:
            UnsupportedModelError: the tables have a form that is not known.
        """
        attention = find_attention(prefill.parts.layers[self.layer])
        width = None if attention is None else head_width(attention)
        assert width is not None
        batch = prefill.text_place.shape[0]
        return Reading(angles(given, width, self.layer).expand(batch, -1, -1), prefill.index)
