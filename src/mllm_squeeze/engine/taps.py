"""Reads queries and keys where attention is computed, and hands on to the implementation that was set."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedModelError

# Without "sdpa", "flash" or "flex" in it: transformers reads those words in a name as support claims.
TAP = "mllm_squeeze_tap"

# Gets query, key, mask and the other arguments; True says that the attention itself is not wanted.
Listener = Callable[[Tensor, Tensor, Any, dict[str, Any]], bool]

_lock = threading.Lock()
_users = 0


class _ModuleView:
    """An attention module as its own implementation expects it: with the config that was set by the user."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Tap:
    """Taps one attention module of one model until `close`.

    The module's `config` attribute points at a copy whose attention implementation is the tap; nothing else of the
    module, the model's config or the class changes.

    Raises:
        UnsupportedModelError: the attention module has no config, so its implementation is not chosen by a registry.
    """

    def __init__(self, module: nn.Module, listener: Callable[[], Listener | None]) -> None:
        config = getattr(module, "config", None)
        if config is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} does not choose its attention through a config, so its scores cannot be "
                "read. Use a method that needs no attention (divprune, uniform)."
            )
        self.module = module
        self.original = config
        self._listener = listener
        tapped = copy.copy(config)
        tapped._attn_implementation_internal = TAP
        tapped._squeeze_tap = self
        _register()
        module.config = tapped

    def close(self) -> None:
        """Put the module's config back."""
        self.module.config = self.original
        _unregister()

    @property
    def implementation(self) -> str:
        """Name of the attention implementation that the user set."""
        return str(self.original._attn_implementation)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        # A copied config must go on pointing at the living tap, not at a twin nobody closes.
        return self

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """Let the listener read, then compute attention as without the tap."""
        listener = self._listener()
        if listener is not None:
            # Choosing tokens needs no gradient, and gradient checkpointing must find the same graph without a listener.
            with torch.no_grad():
                unwanted = listener(query, key, mask, kwargs)
            if unwanted:
                return query.transpose(1, 2), None
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, _eager(self.module))
        return function(_ModuleView(self.module, self.original), query, key, value, mask, **kwargs)


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    config: Any = module.config
    return config._squeeze_tap.forward(query, key, value, attention_mask, **kwargs)


def _eager(module: nn.Module) -> Callable[..., Any]:
    # Only called where the user set "eager", which each modeling file has of its own.
    found: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return cast("Callable[..., Any]", found)


def _register() -> None:
    global _users
    with _lock:
        if _users == 0:
            AttentionInterface.register(TAP, _tapped_attention)
        _users += 1


def _unregister() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            AttentionInterface._global_mapping.pop(TAP, None)


def score_rows(
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    rows: Tensor,
    weights: Tensor,
    causal: bool = True,
) -> Tensor:
    """Return the attention that each key receives from chosen query rows, mean over heads, weighted over rows.

    query: (B, H, M, d). key: (B, Hkv, P, d). mask: as the attention function got it. rows: int64 (B, R). weights:
    float32 (B, R), 0 for padding. causal: whether a mask that is None or 2-D leaves later keys closed. Returns float32
    (B, P).
    """
    _batch, heads, _queries, dim = query.shape
    picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
    allowed = _allowed(mask, rows, query.shape[2], key.shape[2], causal)
    return ops.attention_from_rows(
        picked, key, weights, allowed, scaling=_scaling(kwargs, dim), softcap=kwargs.get("softcap")
    )


def score_received(query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return the attention that each key of an encoder receives from all queries that see it, float32 (B, P).

    Arguments as the attention function got them; a mask keeps pictures apart that are packed into one row.
    """
    allowed = None
    if isinstance(mask, Tensor):
        allowed = _open(mask) if mask.ndim == 4 else mask[:, None, None, :].bool()
    return ops.attention_received(query, key, allowed, scaling=_scaling(kwargs, query.shape[-1]))


def _scaling(kwargs: dict[str, Any], dim: int) -> float:
    scaling = kwargs.get("scaling")
    return float(dim**-0.5 if scaling is None else scaling)


def _allowed(mask: Any, rows: Tensor, queries: int, keys: int, causal: bool) -> Tensor | None:
    """Return bool (B, 1, R or 1, P), which keys each chosen row may see; None where all see all."""
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask[..., :keys].expand(rows.shape[0], -1, -1, -1)
        pick = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        return _open(mask.gather(2, pick))
    real = mask[:, None, None, -keys:].bool() if isinstance(mask, Tensor) else None
    if not causal:
        return real
    before = torch.arange(keys, device=rows.device) <= rows[:, None, :, None] + (keys - queries)
    return before if real is None else before & real


def _open(mask: Tensor) -> Tensor:
    """Return bool: where a bool or additive mask lets attention through."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
