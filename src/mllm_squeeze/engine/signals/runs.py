"""Which unbroken run of the prompt each token stands in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.layout import Span


def runs(prefill: Prefill, origin: Tensor, rows: Sequence[int]) -> Tensor:
    """Return int64 (S, N), the run of each candidate, counted from 0 for each span.

    origin: int64 (S, N), its place in the span before any cut. rows: numbers of the spans.
    """
    assert prefill.layout is not None
    starts = [_starts(prefill.layout.spans[row]) for row in rows]
    most = max(map(len, starts))
    padded = [one + [torch.iinfo(torch.int64).max] * (most - len(one)) for one in starts]
    return torch.searchsorted(ops.on_device(padded, origin), origin.contiguous(), right=True) - 1


def _starts(span: Span) -> list[int]:
    """Return the place in its span at which each run begins; tokens that are hidden have places too."""
    before = [0, *itertools.accumulate(length for _, length in span.runs)][:-1]
    return before if span.origin is None else [span.origin[place] for place in before]
