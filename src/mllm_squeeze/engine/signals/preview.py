"""The attention that a layer would give, by its own projections and rotary embedding, and no more than is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.sequence.signal_store import OneRow
from mllm_squeeze.engine.signals.attention import AttentionSource
from mllm_squeeze.engine.signals.projection import ProjectionSource
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.engine.signals.source import Source
from mllm_squeeze.engine.signals.sources import source_of
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import find_attention, find_pre_norm
from mllm_squeeze.reducers.needs import Need
from mllm_squeeze.upstream.calls import LayerCall, attention_arguments
from mllm_squeeze.upstream.projections import is_offloaded

Reader = Callable[[AttentionCall], None]


class _Enough(Exception):
    """Raised once queries and keys are known: what the module would do with them is not wanted."""


def run_projections(
    attention: nn.Module, normed: Tensor, row: Tensor | None, call: LayerCall, prefill: Prefill, read: Reader
) -> None:
    """Call an attention module up to its attention function and read queries and keys there.

    attention: a tapped module. normed: (B, M, D). row: int64 (B, 1), the one row whose query is read, so that queries
    are projected for it alone; None projects all. call: of its layer; the cache and the mask stay out of it. prefill:
    the pass that runs. read: gets what the attention function is called with.
    """
    offloaded = is_offloaded(attention)

    def listener(read_at: AttentionCall) -> bool:
        read(read_at)
        if offloaded:
            # Its hooks must run to the end, or weights stay where they are not meant to be.
            return True
        raise _Enough

    prefill.signals.listeners[attention] = listener
    if row is not None and not offloaded:
        prefill.signals.one_row[attention] = OneRow(row, normed.shape[1])
    try:
        with torch.no_grad():
            attention(normed, **attention_arguments(call))
    except _Enough:
        pass
    finally:
        prefill.signals.one_row.pop(attention, None)
        del prefill.signals.listeners[attention]


def read_ahead(
    prefill: Prefill, planned: PlannedCut, needs: tuple[Need, ...], hidden: Tensor, call: LayerCall | None
) -> None:
    """Read what a cut needs of the layer behind it: its norm and projections on hidden (B, M, D), as they stand now.

    Raises:
        UnsupportedModelError: they are not found.
    """
    every = dict.fromkeys(source_of(planned, need) for need in needs)
    sources = [source for source in every if source is not None and source.ahead]
    if not sources:
        return
    layer = prefill.parts.layers[planned.layer]
    attention, norm = find_attention(layer), find_pre_norm(layer)
    if attention is None or norm is None:
        raise UnsupportedModelError(
            f"The projections of {type(layer).__name__} cannot be previewed; read the layer before the cut: block: -1."
        )
    assert call is not None
    states = norm(hidden)
    plain = [source for source in sources if isinstance(source, ProjectionSource) and not source.asked.rope]
    for source in plain:
        _keep(prefill, source, source.projected(prefill.parts).module(states))
    others = [source for source in sources if source not in plain]
    if others:
        _run(prefill, planned.layer, attention, states, hidden, call, others)


def _run(
    prefill: Prefill,
    number: int,
    attention: nn.Module,
    states: Tensor,
    hidden: Tensor,
    call: LayerCall,
    sources: list[Source],
) -> None:
    """Read what sources need of the queries and keys of a layer; states: (B, M, D), the norm of hidden."""
    mask = prefill.arguments.mask_now(number, hidden, call)
    before = prefill.arguments.entries_before(number, call)

    @marked("signal")
    def read(heard: AttentionCall) -> None:
        whole = heard if before is None else heard.behind(*before)
        for source in sources:
            _keep(prefill, source, whole.replace(mask=mask))

    last = all(isinstance(source, AttentionSource) and source.asked.rows == "last" for source in sources)
    given = prefill.arguments.given(number, hidden, call)
    run_projections(attention, states, prefill.last_place if last else None, given, prefill, read)


def _keep(prefill: Prefill, source: Source, given: Any) -> None:
    with torch.no_grad():
        found = source.take(prefill, given)
    if found is not None:
        prefill.signals.read[source] = found
