"""Calls that bring states to attend to from outside: of a text model, of a Q-Former, of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mllm_squeeze.upstream.calls import TextCall
from mllm_squeeze.upstream.injections import CROSS_STATES
from mllm_squeeze.upstream.names import ENCODED, ENCODED_MASK

_MASK, _ROWS = "cross_attention_mask", "full_text_row_masked_out_mask"


@dataclass(frozen=True)
class CrossCall:
    """What a call of a text model brings for its cross-attention layers.

    states: (B * pictures * tiles, P, D), None in a pass without pictures. mask: (B, 1, T, K), added to the attention,
    or None. rows: (B, 1, T, 1), 0 where a word sees no picture, or None.
    """

    states: Tensor | None
    mask: Tensor | None
    rows: Tensor | None

    @classmethod
    def read(cls, call: TextCall) -> CrossCall:
        """Read the arguments of a text model."""
        return cls(call.named.get(CROSS_STATES), call.named.get(_MASK), call.named.get(_ROWS))

    def replace(self, **changes: Any) -> CrossCall:
        """Return the call with other states, mask or rows."""
        return replace(self, **changes)

    def arguments(self) -> dict[str, Any]:
        """Return them as arguments of the text model."""
        return {CROSS_STATES: self.states, _MASK: self.mask, _ROWS: self.rows}


@dataclass(frozen=True)
class QueryCall:
    """What a Q-Former or a decoder attends to: states (B, K, D), and a mask (B, K), 0 where closed, or None."""

    states: Tensor | None
    mask: Tensor | None

    @classmethod
    def read(cls, kwargs: Mapping[str, Any]) -> QueryCall:
        """Read the call that a pre-hook sees."""
        return cls(kwargs.get(ENCODED), kwargs.get(ENCODED_MASK))

    def arguments(self) -> dict[str, Any]:
        """Return them as arguments of the module."""
        return {ENCODED: self.states, ENCODED_MASK: self.mask}
