"""Attention of words, each word weighted by what it and the other words give each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection


@selection
def guided_by_words(among: Tensor, received: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (S, N), the attention of each word times its weight in that head, summed over words and heads.

    The weight of a word is what it gives to the words, itself included, and gets from the others.

    among: (S, H, T, T), what each word gives each word. received: (S, H, T, N), what it gives each token. words: bool
    (S, T). mask: bool (S, N).
    """
    both = words[:, None, :, None] & words[:, None, None]
    among = at_least_float32(among).masked_fill(~both, 0)
    received = at_least_float32(received).masked_fill(~(words[:, None, :, None] & mask[:, None, None]), 0)
    weight = among.sum(3) + among.sum(2) - among.diagonal(dim1=2, dim2=3)
    return torch.einsum("sht,shtn->sn", weight, received)


@selection
def with_vectors(text: Tensor) -> Tensor:
    """Return bool (S, M), the words of text (S, M, D) that have a vector: zeros, and what is no number, are padding."""
    return text.nan_to_num().ne(0).any(-1)
