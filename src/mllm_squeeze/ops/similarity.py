"""How alike tokens are to words, to each other, and to the mean of their group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .precision import at_least_float32, selection
from .score import cosine, gaussian_kernels, text_relevance, unit
from .segment import segment_mean
from .select import positions, take, top_k_mask


@selection
def text_similarity(
    visual: Tensor, text: Tensor, words: Tensor, over: Literal["max", "mean", "pooled"], scaled: bool = True
) -> Tensor:
    """Return float32 (S, N), the cosine of each token to the words, joined over the words.

    visual: (S, N, D). text: (S, T, D), with words bool (S, T). A span without words gets zeros. scaled: False takes the
    dot product instead. "pooled" joins the words first, by their mean vector.
    """
    text = text.masked_fill(~words[..., None], 0)
    if over == "pooled":
        text = (at_least_float32(text).sum(1) / words.sum(1).clamp(min=1)[:, None])[:, None]
        words = words.any(1, keepdim=True)
    alike = cosine(at_least_float32(visual), at_least_float32(text), normed=not scaled)
    if over == "max":
        best = alike.masked_fill(~words[:, None], -torch.inf).amax(2)
        return best.masked_fill(~words.any(1, keepdim=True), 0)
    return alike.masked_fill(~words[:, None], 0).sum(2) / words.sum(1).clamp(min=1)[:, None]


@selection
def nearest_similarity(x: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (S, N), the cosine of each token of x (S, N, D) to the other token most like it; -1 where alone.

    Memory O(S * N * N).
    """
    x = unit(x.masked_fill(~mask[..., None], 0))
    alike = cosine(x, x, normed=True).masked_fill(~mask[:, None], -1)
    alike.diagonal(dim1=1, dim2=2).fill_(-1)
    return alike.amax(2)


@selection
def quiet_channels(x: Tensor, label: Tensor, channels: float) -> Tensor:
    """Return float32 (S, N, D), unit vectors of the channels of x that vary least over a span; the others are zero.

    x: (S, N, D). label: int64 (S, N), -1 for tokens that do not count. channels: the fraction of channels to look at.
    """
    whole = label.clamp(max=0)
    x = x.detach().float()
    variance = segment_mean((x - segment_mean(x, whole, 1)).square(), whole, 1)[:, 0]
    quiet = top_k_mask(-variance, variance >= 0, int(channels * x.shape[-1]))
    return unit(x * quiet[:, None])


@selection
def closeness(x: Tensor, label: Tensor, count: int) -> Tensor:
    """Return float32 (S, N), how near each token is to the mean of its group: a sum of five gaussian kernels, up to 5.

    x: (S, N, D). label: int64 (S, N), from 0 to count - 1, -1 for tokens that do not count.
    """
    mean = segment_mean(x, label, count)
    centre = mean if count == 1 else take(mean, label.clamp(min=0))
    return gaussian_kernels((x - centre).square().sum(-1))


@selection
def relevant_words(visual: Tensor, mask: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Return bool (S, T), the words of more than average relevance to the picture, all words where none is above.

    visual: (S, N, D) with mask bool (S, N); text: (S, T, D) with words bool (S, T).
    """
    relevance = text_relevance(visual, mask, text, words)
    # The mean is exactly 1 / T; words that are all alike must not be told apart by rounding.
    above = (relevance * words.sum(1, keepdim=True) > 1 + 1e-5) & words
    return above | (words & ~above.any(1, keepdim=True))


@selection
def nearest_in_group(x: Tensor, targets: Tensor, members: Tensor, label: Tensor) -> Tensor:
    """Return assign (S, N): members go to the target of largest cosine in their group, targets to themselves, else -1.

    x: (S, N, d). targets, members: bool (S, N). label: int64 (S, N). Ties take the first target. Memory O(S * N * N).
    """
    x = unit(x.masked_fill(~members[..., None] & ~targets[..., None], 0))
    same = (label[:, :, None] == label[:, None]) & targets[:, None]
    alike = cosine(x, x, normed=True).masked_fill(~same, -torch.inf)
    found = members & ~targets & same.any(2)
    choice = torch.where(found, alike.argmax(2), -1)
    return torch.where(targets, positions(targets), choice)
