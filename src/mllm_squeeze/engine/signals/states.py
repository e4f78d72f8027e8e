"""States inside a layer: what it gets, what its attention and its MLP get and add, and the MLP's activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.source import Reading, Source, Spot
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.reducers.needs import States
from mllm_squeeze.upstream.block_parts import added_of, last_projection_of, mlp_of


@dataclass(frozen=True)
class StatesSource(Source):
    """Reads what a module of a layer gets or gives."""

    @property
    def asked(self) -> States:
        """The need."""
        assert isinstance(self.need, States)
        return self.need

    def spot(self, parts: ModelParts) -> Spot | None:
        """Return the module; what the layer itself gets is handed over where it is cut."""
        if self.asked.where == "in":
            return None
        module = module_of(self.asked.where, parts.layers[self.layer])
        side: Literal["input", "output"] = "output" if self.asked.where.endswith("_out") else "input"
        return None if module is None else Spot(module, side)

    def take(self, prefill: Prefill, given: Any) -> Reading | None:
        """Return (B, M, D)."""
        states = given.detach()
        added = _added(self.asked.where, prefill.parts.layers[self.layer])
        if added is not None and added[1] != 1:
            states = states * added[1]
        # Some layers run their MLP on all tokens of a batch in one row.
        batch = prefill.text_place.shape[0]
        if states.ndim == 2:
            states = states.reshape(batch, -1, states.shape[-1])
        return Reading(states, prefill.index, prefill.present)


def module_of(where: str, layer: nn.Module) -> nn.Module | None:
    """Return the module of a layer that gets or gives the states of a kind, None where it is not found."""
    if where == "attention_in":
        return find_attention(layer)
    if where == "mlp_in":
        mlp = mlp_of(layer)
        return None if mlp is None else mlp[0]
    if where == "gate":
        return last_projection_of(layer)
    added = _added(where, layer)
    return None if added is None else added[0]


def _added(where: str, layer: nn.Module) -> tuple[nn.Module, float] | None:
    if where == "attention_out":
        return added_of(layer, "attention")
    return added_of(layer, "mlp") if where == "mlp_out" else None
