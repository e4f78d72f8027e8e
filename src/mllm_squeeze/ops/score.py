"""Scores of tokens: cosine similarities and how much text and pictures are alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection

_GRAINS = float(1 << 30)


def unit(x: Tensor) -> Tensor:
    """Return x (..., D) scaled to length 1 in float32 or better; zero vectors stay zero."""
    x = at_least_float32(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)


def own_variance(x: Tensor, mask: Tensor, quality: Tensor | None) -> Tensor:
    """Return float32 (S, N), the diagonal of the kernel of `dpp_map`: quality squared, 0 for zero vectors and padding.

    Exactly 1 where all count alike, so that the first pick is the first token, not a matter of rounding.
    """
    variance = ((x != 0).any(2) & mask).to(at_least_float32(x).dtype)
    return variance if quality is None else variance * quality.to(variance.dtype).square()


def in_grains(value: Tensor) -> Tensor:
    """Return int64, the values in grains of 2 ** -30: sums are exact then, whatever their order, and ties are ties."""
    return (value.double().nan_to_num() * _GRAINS).round().long()


def likeness(products: Tensor, mask: Tensor, clipped: bool = False) -> Tensor:
    """Return int32 (S, N, N), (1 + cosine) / 2 in grains, symmetric to the last of them, 0 to padding.

    products: float (S, N, N), the cosine of all pairs; it is overwritten. clipped: it is the cosine itself instead, 0
    where that is negative.
    """
    alike = products.clamp_(0, 1) if clipped else products.clamp_(max=1).add_(1).mul_(0.5)
    # Of two tokens that are alike only to each other, either adds the same: rounding must not decide.
    alike.diagonal(dim1=1, dim2=2).fill_(1)
    alike.masked_fill_(~(mask[:, :, None] & mask[:, None]), 0)
    return torch.maximum(alike, alike.transpose(1, 2)).mul_(_GRAINS).round_().int()


@selection
def cosine(a: Tensor, b: Tensor, normed: bool = False) -> Tensor:
    """Return float32 (S, A, B), the cosine between each pair of rows of a (S, A, D) and b (S, B, D).

    normed: the rows already have length 1.
    """
    if not normed:
        a, b = unit(a), unit(b)
    return a @ b.transpose(1, 2)


@selection
def paired_cosine(x: Tensor, partner: Tensor) -> Tensor:
    """Return float32 (S, N), the cosine between each token of x (S, N, D) and x[partner]; 0 where partner is -1.

    partner: int64 (S, N).
    """
    x = unit(x)
    other = x.gather(1, partner.clamp(min=0)[..., None].expand_as(x))
    return (x * other).sum(-1).masked_fill(partner < 0, 0)


@selection
def text_relevance(visual: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Return float32 (S, T), how much visual tokens look at each text token: softmax over the text, mean over visual.

    Raw dot products, not scaled. visual: (S, N, D) with mask bool (S, N); text: (S, T, D) with text_mask bool (S, T).
    """
    logits = at_least_float32(visual) @ at_least_float32(text).transpose(1, 2)
    logits = logits.masked_fill(~text_mask[:, None], torch.finfo(logits.dtype).min)
    share = logits.softmax(2).masked_fill(~mask[..., None], 0)
    return share.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def gaussian_kernels(square: Tensor) -> Tensor:
    """Return the sum of exp(-square / (2 * a)) over a = 1/8, 1/4, 1/2, 1, 2, elementwise; in (0, 5]."""
    return torch.stack([(-square / (2 * 2.0**k)).exp() for k in range(-3, 2)]).sum(0)
