"""Signals of the audio encoder, which tells all the sound of a batch in one row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.reducers.needs import SoundAttention


def heard(prefill: Prefill, need: SoundAttention, origin: Tensor, rows: Sequence[int]) -> Tensor:
    """Return float32 (S, N), the signal of each candidate, 0 for what is no sound.

    origin: int64 (S, N), its place in the span before any cut. rows: numbers of the spans.

    Raises:
        UnsupportedInputError: the sound was encoded elsewhere, or some of it is hidden.
    """
    assert prefill.layout is not None
    spans = prefill.layout.spans
    sounds = sorted((n for n, span in enumerate(spans) if span.modality == "audio"), key=lambda n: spans[n].item)
    of_span: dict[int, Tensor] = {}
    if sounds:
        read = prefill.features["audio"].signals.get(need)
        lengths = [spans[n].length for n in sounds]
        if read is None or len(read[0]) != sum(lengths):
            raise UnsupportedInputError(
                f"The prompt shows {sum(lengths)} tokens of sound, of which {0 if read is None else len(read[0])} were "
                "heard being encoded. Let the model encode all of it in this call, and hide none with the mask."
            )
        of_span = dict(zip(sounds, read[0].split(lengths), strict=True))
    empty = torch.zeros(1, device=origin.device)
    values = [of_span[row].to(origin.device) if row in of_span else empty for row in rows]
    padded = nn.utils.rnn.pad_sequence(values, batch_first=True)
    there = origin < torch.tensor([len(value) for value in values]).to(origin.device)[:, None]
    return padded.gather(1, origin.clamp(max=padded.shape[1] - 1)).masked_fill(~there, 0)
