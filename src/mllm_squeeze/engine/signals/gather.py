"""Signals for a cut inside the language model: chosen attention rows, keys, normed states, encoder signals."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.preview import run_projections
from mllm_squeeze.engine.signals.rows import AttentionCall, score_rows
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.engine.tokens.table import SpanTable
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import find_attention, find_pre_norm, is_causal
from mllm_squeeze.reducers.base import Signals
from mllm_squeeze.reducers.needs import (
    Attention,
    EncoderAttention,
    EncoderNeed,
    Features,
    Need,
    Normed,
    Projection,
    Size,
)
from mllm_squeeze.upstream.calls import LayerCall


def mean_weights(mask: Tensor) -> Tensor:
    """Return float32 weights (B, R) that average over the True rows."""
    weights = mask.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def listen(session: Prefill, planned: PlannedCut, number: int) -> None:
    """Make the tap of the layer before a cut, which is the layer of this number, read what the cut will need."""
    attention = find_attention(session.parts.layers[number])
    if attention is None:
        return
    needs = list(dict.fromkeys(whole(need) for need in planned.reducer.needs() if from_layer_before(need)))
    # Rows that were not chosen at layer 0 are those of a cut that has nothing to do.
    needs = [need for need in needs if not chooses_rows(need) or planned.step in session.signals.row_weights]
    if not needs:
        return

    @marked("signal")
    def read(call: AttentionCall) -> bool:
        # A cache of fixed size hands out empty slots as well.
        filled = call.replace(key=call.key[:, :, : session.held[number] + session.lengths[number]])
        queries, keys = filled.query.shape[2], filled.key.shape[2]
        for need in needs:
            if isinstance(need, Attention):
                rows, weights = _rows(session, planned, need)
                scores = score_rows(filled, rows, weights, is_causal(attention))
                session.signals.read[planned, need] = scores[:, keys - queries :]
            else:
                fresh = filled.key[:, :, keys - queries :]
                session.signals.read[planned, need] = fresh.transpose(1, 2).flatten(2)
        return False if others is None else others(call)

    # Another step may cut at the same layer.
    others = session.signals.listeners.get(attention)
    session.signals.listeners[attention] = read


def chooses_rows(need: Need) -> bool:
    """True where the rule itself says which words are read."""
    return isinstance(need, Attention) and need.rows == "chosen"


def from_layer_before(need: Need) -> bool:
    """True where the attention of the layer before a cut has to be read."""
    return isinstance(need, (Attention, Projection)) and need.block == -1


def whole(need: Need) -> Need:
    """Return the need of the whole sequence that holds a need of the visual tokens or of the words."""
    return replace(need, of="visual") if isinstance(need, (Features, Projection, Normed)) else need


def _rows(session: Prefill, planned: PlannedCut, need: Attention) -> tuple[Tensor, Tensor]:
    """Return the rows (B, R) whose attention is read, as they stand now, and their weights."""
    if need.rows == "last":
        return session.last_place, torch.ones_like(session.last_place, dtype=torch.float32)
    if need.rows == "chosen":
        return session.text_place, session.signals.row_weights[planned.step]
    return session.text_place, mean_weights(session.text_mask)


def gather(
    session: Prefill,
    planned: PlannedCut,
    needs: tuple[Need, ...],
    hidden: Tensor,
    call: LayerCall | None,
    table: SpanTable,
    place: Tensor,
    origin: Tensor,
    size: Tensor,
    rows: list[int],
) -> tuple[Signals, Tensor | None]:
    """Return the signals of the candidates, and bool (S, T), the words of each span's sample where a need reads them.

    place, origin: int64 (S, N), where the candidates stand now and stood in their spans. size: float32 (S, N), tokens
    that each stands for. rows: their spans.
    """
    sample = table.sample[:, None]
    words = session.text_place[table.sample]
    sequence: dict[Need, Tensor] = {}
    found: dict[Need, Tensor] = {}
    for need in dict.fromkeys(needs):
        if isinstance(need, EncoderNeed):
            found[need] = _encoder_signal(session, need, origin, rows)
        elif isinstance(need, Size):
            found[need] = size
        elif need == Features("text") and session.text is not None:
            found[need] = session.text[0][table.sample]
        else:
            every = whole(need)
            if every not in sequence:
                sequence[every] = _of_all_tokens(session, planned, every, hidden, call).to(hidden.device)
            found[need] = sequence[every][sample, words if getattr(need, "of", "visual") == "text" else place]
    if not any(need.reads_text for need in needs):
        return Signals(found), None
    there = session.text_mask if session.text is None else session.text[1]
    return Signals(found), there[table.sample]


def _of_all_tokens(session: Prefill, planned: PlannedCut, need: Need, hidden: Tensor, call: LayerCall | None) -> Tensor:
    """Return a signal of the whole sequence: (B, M), or (B, M, D)."""
    if isinstance(need, Features):
        return hidden
    if isinstance(need, Attention) and need.block == "next":
        return _preview(session, planned, need, hidden, call)
    if isinstance(need, Normed):
        return _normed(session, hidden)
    return session.signals.read.pop((planned, need))


def _normed(session: Prefill, hidden: Tensor) -> Tensor:
    norm = session.parts.final_norm
    if norm is None:
        raise UnsupportedModelError(
            f"{type(session.parts.decoder).__name__} has no final norm that could be found; use a method that does not "
            "read normed states."
        )
    normed: Tensor = norm(hidden)
    return normed


def _encoder_signal(session: Prefill, need: Need, origin: Tensor, rows: list[int]) -> Tensor:
    """Return an encoder signal for each candidate, by its place in the span before any cut."""
    assert session.layout is not None
    parts: list[Tensor] = []
    for row in rows:
        span = session.layout.spans[row]
        items = session.features[span.modality].signals[need]
        parts.append(torch.cat([items[span.item + n] for n in range(span.items)]).to(origin.device))
    padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    wide = (1,) * (padded.ndim - 2)
    found = padded.gather(1, origin.view(*origin.shape, *wide).expand(*origin.shape, *padded.shape[2:]))
    # Of attention, an axis of heads stands in front of the tokens.
    return found.transpose(1, 2) if isinstance(need, EncoderAttention) and found.ndim == 3 else found


def _preview(session: Prefill, planned: PlannedCut, need: Attention, hidden: Tensor, call: LayerCall | None) -> Tensor:
    """Return the attention that the layer behind the cut would give: its norm and projections, one chosen row."""
    layer = session.parts.layers[planned.layer]
    attention, norm = find_attention(layer), find_pre_norm(layer)
    if attention is None or norm is None:
        raise UnsupportedModelError(
            f"The projections of {type(layer).__name__} cannot be previewed; use the attention of the layer before: "
            "source: current in the recipe."
        )
    assert call is not None
    given = session.arguments.given(planned.layer, hidden, call)
    rows, weights = _rows(session, planned, need)
    out: list[Tensor] = []

    @marked("signal")
    def read(call: AttentionCall) -> None:
        out.append(score_rows(call.replace(mask=session.present), rows, weights, is_causal(attention)))

    one = rows if rows.shape[1] == 1 else None
    run_projections(attention, norm(hidden), one, given, session, read)
    return out[0]
