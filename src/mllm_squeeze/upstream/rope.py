"""The rotary positions of a text model: how many axes they have, and which tables each layer gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.names import ROPE
from mllm_squeeze.upstream.signatures import forward_parameters

_CONFIG_NAMES = ("rope_parameters", "rope_scaling")
# Where a part of a head is turned and the other is not, the first is the width of both.
_HEAD_WIDTHS = ("qk_head_dim", "head_dim")


def rope_of(config: Any) -> dict[str, Any] | None:
    """Return what the config of a text model says of its rotary positions, None where they are learned."""
    for name in _CONFIG_NAMES:
        found = getattr(config, name, None)
        if isinstance(found, dict) and found:
            return found
    return None


def axes_of(config: Any, base: nn.Module) -> int:
    """Return how many axes positions have: 1, or as many as M-RoPE has sections, mostly three.

    config: of the text model. base: the inner model. There are two witnesses, the sections in the config and the method
    that makes such positions: positions that are kept are right either way, renumbered ones are not.
    """
    sections = (rope_of(config) or {}).get("mrope_section")
    if sections is None:
        return 3 if hasattr(base, "get_rope_index") else 1
    return max(len(sections), 3)


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


def head_width(attention: nn.Module) -> int | None:
    """Return how many channels a query has per head, None where the module does not say."""
    found = (getattr(attention, name, None) for name in _HEAD_WIDTHS)
    return next((width for width in found if isinstance(width, int)), None)


def leaves_unturned(attention: nn.Module) -> bool:
    """True where an attention module says that it does not use the rotary tables it is given."""
    return not getattr(attention, "use_rope", True)


def angles(tables: Any, width: int, layer: int) -> Tensor:
    """Return float32 (B or 1, M, 2 * width), cosines and then sines of the angles of each channel of a head.

    Channels that are not turned have the angle 0. Which two channels are a pair does not show: both have its angle.

    tables: what a layer is given, (cos, sin) of (B or 1, M, r), or complex (B or 1, M, r / 2). width: channels of a
    head. layer: its number, for messages.

    Raises:
        UnsupportedModelError: the tables have another form, or there are none.
    """
    if isinstance(tables, Tensor) and tables.is_complex():
        tables = tuple(part.repeat_interleave(2, dim=-1) for part in (tables.real, tables.imag))
    pair = isinstance(tables, (tuple, list)) and len(tables) == 2 and all(isinstance(part, Tensor) for part in tables)
    if not pair or any(part.ndim != 3 or part.shape[-1] > width for part in tables):
        raise UnsupportedModelError(
            f"The rotary angles of layer {layer} cannot be read: expected a cosine and a sine for each token and "
            f"channel, of at most {width} channels, as '{ROPE}'; found {_form(tables)}. Use a method that reads none."
        )
    cos, sin = (part.detach().float() for part in tables)
    rest = width - cos.shape[-1]
    return torch.cat([functional.pad(cos, (0, rest), value=1.0), functional.pad(sin, (0, rest))], dim=-1)


def _form(tables: Any) -> str:
    if isinstance(tables, Tensor):
        return f"a tensor {tuple(tables.shape)} of {tables.dtype}"
    if isinstance(tables, (tuple, list)):
        return f"({', '.join(_form(part) for part in tables)})"
    return "none" if tables is None else f"a {type(tables).__name__}"
