"""The rotary positions of a text model: how many axes they have, and which tables each layer gets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mllm_squeeze.upstream.signatures import forward_parameters

_CONFIG_NAMES = ("rope_parameters", "rope_scaling")


def rope_of(config: Any) -> dict[str, Any] | None:
    """Return what the config of a text model says of its rotary positions, None where they are learned."""
    for name in _CONFIG_NAMES:
        found = getattr(config, name, None)
        if isinstance(found, dict) and found:
            return found
    return None


def has_three_axes(config: Any, base: nn.Module) -> bool:
    """True where positions have three axes (M-RoPE).

    config: of the text model. base: the inner model. There are two witnesses, the sections in the config and the method
    that makes such positions: positions that are kept are right either way, renumbered ones are not.
    """
    rope = rope_of(config)
    return (rope is not None and rope.get("mrope_section") is not None) or hasattr(base, "get_rope_index")


def rotary_of(decoder: nn.Module) -> nn.Module | None:
    """Return the rotary embedding of a text model, None where positions are learned."""
    found = getattr(decoder, "rotary_emb", None)
    return found if isinstance(found, nn.Module) else None


def rope_kinds(decoder: nn.Module) -> list[str] | None:
    """Return the name of the rotary tables of each layer, None where all layers share one pair."""
    rotary = rotary_of(decoder)
    if rotary is None:
        return None
    kinds: Any = getattr(decoder, "rope_types", None)
    if kinds is None and "layer_type" in forward_parameters(rotary):
        config: Any = decoder.config
        kinds = config.layer_types
    return None if kinds is None else [str(kind) for kind in kinds]


def rotate(decoder: nn.Module, kind: str | None, hidden: Tensor, positions: Tensor) -> Any:
    """Return rotary tables as the text model makes them.

    kind: name of the tables, None where there is one pair. hidden: (B, T, D). positions: int64 (B, T).
    """
    rotary = rotary_of(decoder)
    assert rotary is not None
    if kind is None:
        return rotary(hidden, positions)
    # Molmo2 has a module per kind, Gemma 3 one that is told the kind.
    own: Any = getattr(decoder, f"rotary_emb_{kind}", None)
    if own is not None or hasattr(decoder, "rope_types"):
        return (own or rotary)(hidden, positions)
    return rotary(hidden, positions, kind)
