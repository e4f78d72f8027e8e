"""Queries, keys or values of a layer: as attention gets them, or as the projections give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.engine.signals.source import Found, Reading, Source, Spot
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.reducers.needs import Projection
from mllm_squeeze.upstream.block_parts import Projected, projected_of


@dataclass(frozen=True)
class ProjectionSource(Source):
    """Reads the attention function behind rotary embedding and norms, or the projection in front of them."""

    @property
    def asked(self) -> Projection:
        """The need."""
        assert isinstance(self.need, Projection)
        return self.need

    def spot(self, parts: ModelParts) -> Spot | None:
        """The attention function, or the output of the projection."""
        attention = find_attention(parts.layers[self.layer])
        if attention is None:
            return None
        return Spot(attention, "call") if self.asked.rope else Spot(self.projected(parts).module, "output")

    def projected(self, parts: ModelParts) -> Projected:
        """Return where the projection is.

        Raises:
            UnsupportedModelError: it is not found; planning says so before.
        """
        attention = find_attention(parts.layers[self.layer])
        found = "it has no attention" if attention is None else projected_of(attention, self.asked.what)
        if isinstance(found, str):
            raise UnsupportedModelError(f"The projections of layer {self.layer} cannot be read: {found}.")
        return found

    def take(self, prefill: Prefill, given: Any) -> Reading | None:
        """Return (B, M, H, d)."""
        return Reading(self._states(prefill, given), prefill.index, prefill.present)

    def _states(self, prefill: Prefill, given: Any) -> Tensor:
        if not self.asked.rope:
            return self.projected(prefill.parts).take(given.detach())
        call: AttentionCall = given
        states: Tensor = getattr(call, self.asked.what)
        # Keys and values come with those of earlier passes in front.
        return states[:, :, states.shape[2] - call.query.shape[2] :].transpose(1, 2).detach()

    def answer(self, prefill: Prefill, reading: Reading, found: Found, side: str) -> Tensor:
        """Return (S, N, H * d), (S, N, d) or (S, N, H, d)."""
        states = super().answer(prefill, reading, found, side)
        if self.asked.heads == "concat":
            return states.flatten(2)
        return states.mean(2) if self.asked.heads == "mean" else states
