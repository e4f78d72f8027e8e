"""Visual features that a text model takes beside its sequence, by the arguments and methods that they go through.

Three ways are known: pictures as keys of cross-attention layers (Mllama), features added behind the first layers by a
method (deepstack), and features added in front of inner layers by a mask over the prompt (Granite 4 Vision).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.upstream.names import EMBEDDINGS, IDS, MASK, POSITIONS, ROUTING
from mllm_squeeze.upstream.signatures import forward_parameters

CROSS_STATES = "cross_attention_states"
CROSS_LAYER = "cross_attn"
DEEPSTACK_METHOD = "_deepstack_process"
DEEPSTACK_PARAMETERS = ("hidden_states", "visual_pos_masks", "visual_embeds")
DEEPSTACK_ARGUMENTS = ("visual_pos_masks", "deepstack_visual_embeds")
INNER_FEATURES = "deepstack_features"
INNER_MASK = "vision_mask"

AddFeatures = Callable[[Tensor, Tensor, Tensor], Tensor]


def takes_cross_states(decoder: nn.Module) -> bool:
    """True where the text model attends to pictures that are no part of its sequence."""
    return CROSS_STATES in forward_parameters(decoder)


def cross_layers(layers: nn.ModuleList) -> tuple[int, ...]:
    """Return the numbers of the decoder layers that attend to pictures."""
    return tuple(number for number, layer in enumerate(layers) if CROSS_LAYER in layer._modules)


def shown_tiles(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return which tiles of each picture are shown (B, pictures, tiles), and the ids (B, pictures), 0 for no picture.

    inputs: of the inner model. Either is None where it is not given.
    """
    ratios, ids = inputs.get("aspect_ratio_mask"), inputs.get("aspect_ratio_ids")
    return ratios if isinstance(ratios, Tensor) else None, ids if isinstance(ids, Tensor) else None


def takes_deepstack(decoder: nn.Module) -> bool:
    """True where the text model adds deepstack features (Qwen3-VL and its kin)."""
    return hasattr(decoder, DEEPSTACK_METHOD)


def replace_deepstack(decoder: nn.Module, wrap: Callable[[AddFeatures], AddFeatures]) -> Callable[[], None]:
    """Put another function in front of the deepstack addition of one text model; returns what takes it off again.

    wrap: gets the addition as it was, (hidden (B, M, D), visual (B, T), features (n, D)) -> (B, M, D), and returns its
    replacement.
    """
    original: Any = getattr(decoder, DEEPSTACK_METHOD)
    replacement = wrap(original)

    # Under the names that it has there, as it may be called by them.
    def process(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        return replacement(hidden_states, visual_pos_masks, visual_embeds)

    decoder.__dict__[DEEPSTACK_METHOD] = process

    def undo() -> None:
        del decoder.__dict__[DEEPSTACK_METHOD]

    return undo


def takes_inner_features(decoder: nn.Module) -> bool:
    """True where the text model adds features in front of inner layers by a mask over the full prompt."""
    return INNER_MASK in forward_parameters(decoder)


def split_inner_features(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Mapping[int, Tensor] | None, Tensor | None]:
    """Take such features out of a text model's arguments.

    Returns the arguments without them, the features by layer, and bool (B, T), where they belong; None without any.
    """
    features, mask = kwargs.get(INNER_FEATURES), kwargs.get(INNER_MASK)
    if not isinstance(features, Mapping) or not isinstance(mask, Tensor):
        return kwargs, None, None
    visual = mask[..., 0] if mask.ndim == 3 else mask
    return {**kwargs, INNER_FEATURES: None, INNER_MASK: None}, features, visual


PER_LAYER = "per_layer_inputs"
# Arguments with one entry per token, by the axis of the tokens.
_COLUMNS = {EMBEDDINGS: 1, IDS: 1, POSITIONS: -1, DEEPSTACK_ARGUMENTS[0]: 1, INNER_MASK: 1, PER_LAYER: 1, ROUTING: 1}
# What belongs to the visual tokens of a prompt, and to no later pass.
_VISUAL = (*DEEPSTACK_ARGUMENTS, INNER_MASK, INNER_FEATURES)


def columns(given: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return the arguments of a text model for some of its tokens, those before them seen by the cache.

    given: for all tokens, a mask (B, T) among them. start: above 0 for a step behind all visual tokens.
    """
    taken = {}
    for name, value in given.items():
        if name == MASK:
            taken[name] = value[:, :stop]
        elif start == 0 or name not in _VISUAL:
            axis = _COLUMNS.get(name)
            taken[name] = value if axis is None else value.narrow(axis, start, stop - start)
    return taken
