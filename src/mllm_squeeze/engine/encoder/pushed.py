"""How the projector answers where what it gets is pushed a little: what a token of the LLM owes to its patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.reducers.needs import Sensitivity
from mllm_squeeze.upstream import configs
from mllm_squeeze.upstream.twins import in_float32


def maps_token_by_token(parts: ModelParts) -> bool:
    """True where a token of the projector's output is made of one token of its input, or of some in a row."""
    return parts.row.per_token or parts.row.tower_to_llm == "block_merge"


def read_sensitivity(need: Sensitivity, projector: nn.Module, states: Tensor, parts: ModelParts) -> Tensor:
    """Return how far each output moves, float32 (tiles, N) in the places of the patches that it is made of.

    states: (tiles, N, C), or (sum, C) of a packed tower, which counts as one tile.

    Raises:
        UnsupportedModelError: the weights of the projector are not there.
    """
    if any(weight.is_meta for weight in projector.parameters()):
        raise UnsupportedModelError(
            f"The projector ({type(projector).__name__}) cannot be pushed: its weights are offloaded, or on the meta "
            "device. Load it on a device (device_map), or use a method that reads nothing of the vision encoder.",
            avoid=["encoder attention"],
        )
    noise = torch.randn(need.directions, states.shape[-1], generator=torch.Generator().manual_seed(need.seed))
    directions = ops.on_device(noise, states)
    moved = ops.push_response(states, in_float32(projector), directions, need.step)
    if parts.row.tower_to_llm == "block_merge":
        moved = moved.repeat_interleave(configs.tower_merge(parts.config) ** 2, -1)
    return moved if moved.ndim == 2 else moved[None]
