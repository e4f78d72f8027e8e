"""How much of the values of some tokens is like those of others, as attention would have it."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection


@selection
def value_likeness(rows: Tensor, row_mask: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (S, R, M), softmax over tokens of row * value / sqrt(d), mean over heads; 0 for no row.

    arXiv 2602.03060. rows: (S, R, H, d). row_mask: bool (S, R). values: (S, M, H, d). mask: bool (S, M).
    """
    rows, values = at_least_float32(rows), at_least_float32(values)
    logits = torch.einsum("srhd,smhd->shrm", rows, values) / rows.shape[-1] ** 0.5
    share = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(3).mean(1)
    return share.masked_fill(~row_mask[..., None], 0)
