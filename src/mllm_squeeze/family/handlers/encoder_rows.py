"""Pictures among what an encoder gives for a decoder to attend to: which rows they are, and which are words."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import Span, TokenLayout


def picture_rows(parts: ModelParts, states: Tensor, mask: Tensor | None, ids: Tensor | None) -> TokenLayout:
    """Return where the pictures are; each run of rows is one.

    states: (B, K, D), what the encoder gave. mask: (B, K), 0 where closed, or None. ids: (B', T), the prompt that it
    read, B a multiple of B'; None where it is not known. Reads mask and ids from the device.

    Raises:
        UnsupportedInputError: the ids are needed and not known, or do not fit the states.
    """
    batch, length, _ = states.shape
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu().bool()
    visual = real & _shown(parts, batch, length, ids)
    spans: list[Span] = []
    for sample, row in enumerate(visual):
        for start, count in _runs(row):
            spans.append(Span(sample, "image", len(spans), ((start, count),)))
    return TokenLayout(batch, length, tuple(spans), real, keys=True)


def _shown(parts: ModelParts, batch: int, length: int, ids: Tensor | None) -> Tensor:
    """Bool (B, K) or (1, K), True where a row of the encoder stands for a picture."""
    if parts.row.encoded == "all":
        return torch.ones(1, length, dtype=torch.bool)
    if ids is None:
        raise UnsupportedInputError(
            "What the encoder gave holds pictures and words, and only the prompt's ids say which is which. Pass "
            "`input_ids`, also beside `encoder_outputs`."
        )
    words = ids.shape[1]
    if batch % len(ids) or (words != length if parts.row.encoded == "placeholders" else words > length):
        raise UnsupportedInputError(
            f"The encoder gave {batch} rows of {length}, and the prompt has {len(ids)} rows of {words} ids. Pass the "
            "`input_ids` that the encoder read."
        )
    if parts.row.encoded == "behind":
        return (torch.arange(length) >= words)[None]
    return (ids.cpu() == parts.ids["image"]).repeat_interleave(batch // len(ids), 0)


def _runs(row: Tensor) -> list[tuple[int, int]]:
    """Return (start, length) of each run of True; row: bool (K,)."""
    edges = torch.diff(row.long(), prepend=torch.zeros(1, dtype=torch.long), append=torch.zeros(1, dtype=torch.long))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]
