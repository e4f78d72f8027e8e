"""The hook on a Q-Former: the image features that its queries attend to get fewer (BLIP-2, InstructBLIP)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks
from mllm_squeeze.engine.keys.kept import reduce_keys, take_row_mask
from mllm_squeeze.engine.trace import Attended
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.layout import Span, Tile, TokenLayout
from mllm_squeeze.upstream.attended import QueryCall


class QueryHooks(Hooks):
    """Takes rows of a Q-Former's `encoder_hidden_states` and columns of the mask over them."""

    def attach(self, installer: Installer) -> None:
        """Put the hook on.

        Raises:
            UnsupportedModelError: there is no Q-Former.
        """
        queries = self.parts.queries
        if queries is None:
            raise UnsupportedModelError(f"No Q-Former was found in {type(self.parts.base).__name__}.")
        installer.before(queries, self._before)

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = QueryCall.read(kwargs)
        if call.states is None or not self._enabled():
            return None
        layout = _layout(call.states, call.mask)
        prefill, short, kept = reduce_keys(self.parts, self._requests.planned(), layout, call.states)
        prefill.attended = Attended((), 0, call.states.shape[1], short.shape[1])
        self._publish(prefill)
        if kept is None:
            return None
        return args, {**kwargs, **QueryCall(short, take_row_mask(call.mask, kept)).arguments()}


def _layout(states: Tensor, mask: Tensor | None) -> TokenLayout:
    """One span per row, which is an image: a CLS token and the patches, without what the mask closes."""
    batch, length, _ = states.shape
    side = math.isqrt(length - 1)
    whole = (Tile(1, side, side, frame_lead=1),) if side * side == length - 1 else ()
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu().bool()
    spans = []
    for row, columns in enumerate(real):
        if bool(columns.all()):
            spans.append(Span(row, "image", row, ((0, length),), whole))
        elif bool(columns.any()):
            spans.append(Span(row, "image", row, tuple((n, 1) for n in columns.nonzero().flatten().tolist())))
    return TokenLayout(batch, length, tuple(spans), real, keys=True)
