"""Scores brought to one scale, span by span, so that they can be added. Padding and -inf take no part and stay."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import at_least_float32, selection
from .score import unit
from .select import ranks


@selection
def normalised(score: Tensor, mask: Tensor, how: str) -> Tensor:
    """Return float32 (S, N), the score of each span on a scale of its own.

    score: (S, N), any float dtype; padding may hold anything.
    mask: bool (S, N).
    how: "none"; "minmax" to [0, 1]; "zscore" to mean 0 and standard deviation 1 (of all tokens, not of a sample);
        "softmax" to numbers that sum to 1; "share" divides by the sum, and 1e-8; "rank" to 1 for the best and 1 / n for
        the last of n, ties by index; "unit" divides by the Euclidean length. Where all are equal minmax and zscore
        give 0.

    Raises ValueError for another word.
    """
    score = at_least_float32(score.detach())
    there = mask & ~score.isinf()
    inside = score.masked_fill(~there, 0)
    count = there.sum(1, keepdim=True).clamp(min=1)
    if how == "none":
        scaled = inside
    elif how == "minmax":
        low = score.masked_fill(~there, torch.inf).amin(1, keepdim=True)
        wide = score.masked_fill(~there, -torch.inf).amax(1, keepdim=True) - low
        scaled = torch.where(wide > 0, (inside - low) / wide, 0)
    elif how == "zscore":
        off = (inside - inside.sum(1, keepdim=True) / count).masked_fill(~there, 0)
        deviation = (off.square().sum(1, keepdim=True) / count).sqrt()
        scaled = torch.where(deviation > 0, off / deviation, 0)
    elif how == "softmax":
        scaled = score.masked_fill(~there, -torch.inf).softmax(1)
    elif how == "share":
        scaled = inside / (inside.sum(1, keepdim=True) + 1e-8)
    elif how == "rank":
        scaled = 1 - ranks(score, there) / count
    elif how == "unit":
        scaled = unit(inside)
    else:
        raise ValueError(f"scores are normalised by none, minmax, zscore, softmax, share, rank or unit; got {how!r}")
    return scaled.where(there, score.where(mask, -torch.inf))


@selection
def fused(scores: Tensor, weights: Sequence[float], how: str) -> Tensor:
    """Return float32 (S, N), several scores as one; -inf where one of them is -inf.

    scores: (K, S, N).
    weights: one of each score.
    how: "sum" adds weight * score; "product" multiplies score ** weight, where negative scores count as 0.

    Raises ValueError for another word.
    """
    scores = at_least_float32(scores.detach())
    never = (scores == -torch.inf).any(0)
    scores = scores.masked_fill(never, 0)
    if how == "sum":
        parts = [score * weight for score, weight in zip(scores, weights, strict=True)]
        total = functools.reduce(torch.add, parts)
    elif how == "product":
        parts = [score.clamp(min=0) ** weight for score, weight in zip(scores, weights, strict=True)]
        total = functools.reduce(torch.mul, parts)
    else:
        raise ValueError(f"scores are fused by sum or product; got {how!r}")
    return total.masked_fill(never, -torch.inf)


@selection
def steadied(scores: Tensor, mask: Tensor) -> Tensor:
    """Return float64 (K, S, N), scores weighted by 1 / variance over the span; the weights of a span sum to 1.

    Scores without variance share alike, and beside them the others count nothing. scores: (K, S, N), of which -inf
    takes no part and stays. mask: bool (S, N). It is float64 as what hardly varies differs in digits that float32 does
    not hold.
    """
    there = mask & ~scores.isinf().any(0)
    inside = scores.double().masked_fill(~there, 0)
    count = there.sum(1, keepdim=True).clamp(min=1)
    off = (inside - inside.sum(2, keepdim=True) / count).masked_fill(~there, 0)
    variance = off.square().sum(2, keepdim=True)
    still = variance == 0
    weight = torch.where(still.any(0), still.double(), 1 / variance.where(~still, 1))
    return (inside * weight / weight.sum(0)).where(there, scores.double().where(mask, 0))
