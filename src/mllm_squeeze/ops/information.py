"""How much a token tells: beyond what was expected of it, and as a part of the whole picture.

Throughout, S is spans, N tokens of the longest span, and `mask` bool (S, N) is False at padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection

_LEAST = 1e-10


@selection
def beyond_prior(attention: Tensor, prior: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (S, N), p * log(p / q): the share of each token in the divergence of attention from its prior.

    attention, prior: (S, N), not negative; p and q are their shares of the sum over the span. A span whose attention is
    its prior has nothing to tell, so it gets p itself.
    """
    p, q = (_shares(x, mask) for x in (attention, prior))
    gain = p * ((p + _LEAST) / (q + _LEAST)).log()
    same = (p == q).all(1, keepdim=True)
    return torch.where(same, p, gain.nan_to_num(0, 1e6, -1e6))


def _shares(x: Tensor, mask: Tensor) -> Tensor:
    x = x.float().masked_fill(~mask, 0)
    return x / (x.sum(1, keepdim=True) + _LEAST)


@selection
def spectral_weight(x: Tensor, mask: Tensor) -> Tensor:
    """Return float64 (S, N), sum over c of |U[i, c]| * S[c] of the singular value decomposition U S V^T of a span.

    x: (S, N, D). Worked out in float64 from the eigenvectors of x x^T; memory (S, N, N). On a GPU the decomposition
    waits for the device.
    """
    x = x.double().masked_fill(~mask[..., None], 0)
    power, vectors = torch.linalg.eigh(x @ x.transpose(1, 2))
    # What rounding leaves of a singular value 0 is no direction of the picture.
    floor = power.amax(1, keepdim=True) * (x.shape[1] * torch.finfo(x.dtype).eps)
    values = torch.where(power > floor, power, 0).sqrt()
    return (vectors.abs() @ values[..., None])[..., 0]
