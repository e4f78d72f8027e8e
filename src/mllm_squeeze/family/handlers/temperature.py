"""Attention temperature that grows with the place in the cache: after a cut, a place is no longer a position."""

from __future__ import annotations

from typing import Any

from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream.configs import temperature_start


def refuse_scaled(config: Any, length: int) -> None:
    """Refuse prompts so long that the text model scales its queries by their place (Llama 4).

    length: tokens seen after this pass.

    Raises:
        UnsupportedInputError: the scale is no longer 1, and would be taken from the shortened sequence.
    """
    start = temperature_start(config)
    if start is not None and length >= start:
        raise UnsupportedInputError(
            f"This text model scales attention by the place in the cache from token {start} on, and {length} tokens "
            "were seen: after a cut the places are others. Use a shorter prompt, or the dense model "
            "(handle.using(off=True))."
        )
