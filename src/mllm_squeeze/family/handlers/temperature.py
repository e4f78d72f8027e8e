"""Attention temperature that grows with the place in the cache: after a cut, a place is no longer a position."""

from __future__ import annotations

from typing import Any

from mllm_squeeze.errors import UnsupportedInputError


def refuse_scaled(config: Any, length: int) -> None:
    """Refuse prompts so long that the text model scales its queries by their place (Llama 4).

    length: tokens seen after this pass.

    Raises:
        UnsupportedInputError: the scale is no longer 1, and would be taken from the shortened sequence.
    """
    scale = getattr(config, "floor_scale", None)
    if scale and getattr(config, "attn_temperature_tuning", False) and length >= scale:
        raise UnsupportedInputError(
            f"This text model scales attention by the place in the cache from token {int(scale)} on, and {length} "
            "tokens were seen: after a cut the places are others. Use a shorter prompt, or the dense model "
            "(handle.disabled())."
        )
