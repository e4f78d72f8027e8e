"""The attention that a layer would give, by its own projections and rotary embedding, and no more than is asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.sequence.signal_store import OneRow
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.upstream.calls import LayerCall, attention_arguments
from mllm_squeeze.upstream.projections import is_offloaded

Reader = Callable[[AttentionCall], None]


class _Enough(Exception):
    """Raised once queries and keys are known: what the module would do with them is not wanted."""


def run_projections(
    attention: nn.Module, normed: Tensor, row: Tensor | None, call: LayerCall, session: Prefill, read: Reader
) -> None:
    """Call an attention module up to its attention function and read queries and keys there.

    attention: a tapped module. normed: (B, M, D). row: int64 (B, 1), the one row whose query is read, so that queries
    are projected for it alone; None projects all. call: of its layer; the cache and the mask stay out of it. session:
    the pass that runs. read: gets what the attention function is called with.
    """
    offloaded = is_offloaded(attention)

    def listener(read_at: AttentionCall) -> bool:
        read(read_at)
        if offloaded:
            # Its hooks must run to the end, or weights stay where they are not meant to be.
            return True
        raise _Enough

    session.signals.listeners[attention] = listener
    if row is not None and not offloaded:
        session.signals.one_row[attention] = OneRow(row, normed.shape[1])
    try:
        with torch.no_grad():
            attention(normed, **attention_arguments(call))
    except _Enough:
        pass
    finally:
        session.signals.one_row.pop(attention, None)
        del session.signals.listeners[attention]
