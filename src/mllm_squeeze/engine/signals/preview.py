"""The attention that a layer would give, by its own projections and rotary embedding, and no more than is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.hooks.installer import Fittings
from mllm_squeeze.engine.sequence.session import OneRow, Session
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.upstream.calls import Arguments, LayerCall, attention_arguments
from mllm_squeeze.upstream.projections import is_offloaded, rowwise_projections

Reader = Callable[[AttentionCall], None]


class _Enough(Exception):
    """Raised once queries and keys are known: what the module would do with them is not wanted."""


def run_projections(
    attention: nn.Module, normed: Tensor, row: Tensor | None, call: LayerCall, session: Session, read: Reader
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

    session.listeners[attention] = listener
    if row is not None and not offloaded:
        session.one_row[attention] = OneRow(row, normed.shape[1])
    try:
        with torch.no_grad():
            attention(normed, **attention_arguments(call))
    except _Enough:
        pass
    finally:
        session.one_row.pop(attention, None)
        del session.listeners[attention]


def put_on(fittings: Fittings, attention: nn.Module, session: Callable[[], Session | None]) -> None:
    """Put hooks on the projections of an attention module, which do nothing but in a preview that runs one row.

    They are there as long as the handle is, so that nothing is left on the model however a preview ends.
    """

    def one() -> OneRow | None:
        now = session()
        return None if now is None else now.one_row.get(attention)

    def narrow(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Arguments | None:
        wanted = one()
        if wanted is None:
            return None
        hidden = args[0]
        index = wanted.row.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *args[1:]), kwargs

    # Rotary embedding comes behind the projection and by place, so the chosen row still gets its own rotation.
    def widen(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        wanted = one()
        return None if wanted is None else output.expand(-1, wanted.length, -1)

    for projection in rowwise_projections(attention):
        fittings.before(projection, narrow)
        fittings.after(projection, widen)
