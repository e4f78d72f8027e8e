"""States in front of a cut behind the final norm of the language model."""

from __future__ import annotations

from torch import Tensor

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.errors import UnsupportedModelError


def normed(prefill: Prefill, hidden: Tensor) -> Tensor:
    """Return the final norm of hidden (B, M, D).

    Raises:
        UnsupportedModelError: no final norm is found.
    """
    norm = prefill.parts.final_norm
    if norm is None:
        raise UnsupportedModelError(
            f"{type(prefill.parts.decoder).__name__} has no final norm that could be found; use a method that does not "
            "read normed states."
        )
    found: Tensor = norm(hidden)
    return found
