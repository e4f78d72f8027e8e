"""What modules give back, read by role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.names import CACHE_NAMES

_LAYER_STATES = "hidden_states"


def hidden_of(output: Any) -> Tensor:
    """Return the states (B, T, D) that a text model gave."""
    found = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(
            f"The text model gave a {type(output).__name__} without hidden states: expected a tuple, or "
            "'last_hidden_state'."
        )
    return found


def with_layer_states(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the output of a text model with the states that it collected of its layers changed, where it did."""
    states = getattr(output, _LAYER_STATES, None)
    if not isinstance(states, tuple):
        return output
    return replace(output, **{_LAYER_STATES: tuple(map(change, states))})


def cache_of_output(output: Any) -> Any:
    """Return the cache that a model handed out, None without one."""
    if isinstance(output, tuple):
        return next((item for item in output if isinstance(item, Cache)), None)
    # Other names than those of fields are properties that warn.
    names = {field.name for field in fields(output)}
    return next((getattr(output, name) for name in CACHE_NAMES if name in names), None)


def packed(output: Any) -> Tensor | None:
    """Return the features that a feature method gave side by side for all items, (sum, D); None for other forms."""
    # Some releases hand out the features by themselves.
    found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def block_states(output: Any) -> Tensor:
    """Return the states that an encoder block gave."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_block_states(output: Any, states: Tensor) -> Any:
    """Return what an encoder block gave, with other states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def projected(output: Any, late: bool = False) -> Tensor | list[Tensor] | None:
    """Return the features that a feature method gave: (items, N, D), a list with (N, D) each, or None.

    late: the projector comes behind the method. Where each of several decoder layers gets features of its own, those of
    the first are returned.
    """
    found = getattr(output, "last_hidden_state" if late else "pooler_output", None)
    if found is None and getattr(output, "deepstack_features", None):
        found = output.deepstack_features[0][1]
    if isinstance(found, Tensor):
        return found if found.ndim == 3 else None
    if isinstance(found, (list, tuple)) and all(isinstance(item, Tensor) for item in found):
        return list(found)
    return None
