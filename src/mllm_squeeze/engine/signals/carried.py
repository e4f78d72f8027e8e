"""Signals of the vision encoder, carried to the tokens that the language model gets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.reducers.needs import EncoderAttention, Need


def carried(prefill: Prefill, need: Need, origin: Tensor, rows: list[int]) -> Tensor:
    """Return an encoder signal for each candidate, by its place in the span before any cut.

    origin: int64 (S, N). rows: numbers of the spans.
    """
    assert prefill.layout is not None
    parts: list[Tensor] = []
    for row in rows:
        span = prefill.layout.spans[row]
        items = prefill.features[span.modality].signals[need]
        parts.append(torch.cat([items[span.item + n] for n in range(span.items)]).to(origin.device))
    padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    wide = (1,) * (padded.ndim - 2)
    found = padded.gather(1, origin.view(*origin.shape, *wide).expand(*origin.shape, *padded.shape[2:]))
    # Of attention, an axis of heads stands in front of the tokens.
    return found.transpose(1, 2) if isinstance(need, EncoderAttention) and found.ndim == 3 else found
