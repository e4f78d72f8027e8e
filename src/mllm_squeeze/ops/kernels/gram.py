"""The matrix of all pairs that greedy choices walk over, at full speed on the tensor cores."""

# Triton functions have no types of ours.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..score import unit
from . import launching, power_of_two, readable
from .match import inverse_norms

# Entries of the matrix of all pairs that may be held at once: 2 ** 28 float32 numbers are 1 GiB.
GRAM_LIMIT = 1 << 28
# Numbers per token are held in the registers of one program.
WIDTH_LIMIT = 1 << 15


@triton.jit
def _gram(
    x, scale, mask, out, N, d, stride_span, stride_row, stride_dim, out_row,
    DISTANCE: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(2).to(tl.int64)
    x += span * stride_span
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dot = tl.zeros((BLOCK, BLOCK), tl.float32)
    left_row = a.to(tl.int64)[:, None] * stride_row
    right_row = b.to(tl.int64)[None, :] * stride_row
    for first in range(0, d, BD):
        dims = first + tl.arange(0, BD)
        inside = dims < d
        left = tl.load(x + left_row + dims[None, :] * stride_dim, mask=(a < N)[:, None] & inside[None, :], other=0.0)
        right = tl.load(x + right_row + dims[:, None] * stride_dim, mask=(b < N)[None, :] & inside[:, None], other=0.0)
        dot = tl.dot(left, right, dot)
    left_scale = tl.load(scale + span * N + a, mask=a < N, other=0.0)
    right_scale = tl.load(scale + span * N + b, mask=b < N, other=0.0)
    value = dot * left_scale[:, None] * right_scale[None, :]
    if DISTANCE:
        there = tl.load(mask + span * N + b, mask=b < N, other=0) != 0
        value = tl.where((a[:, None] == b[None, :]) | ~there[None, :], float("inf"), 1 - value)
    place = (span * N + a.to(tl.int64))[:, None] * out_row + b[None, :]
    tl.store(out + place, value, mask=(a < N)[:, None] & (b < N)[None, :])


def gram(x: Tensor, mask: Tensor, quality: Tensor | None, distance: bool) -> Tensor:
    """Return float32 (S, N, N'), N' >= N: products of the rows of x (S, N, D) scaled to length `quality` (None: 1).

    distance: 1 - that instead, infinite to itself and to padding.
    """
    if x.dtype == torch.float32:
        return _exact_gram(x, mask, quality, distance)
    x = readable(x)
    spans, width, dim = x.shape
    scale = inverse_norms(x)
    if quality is not None:
        scale = scale * quality.float()
    # Rows of whole 64 bytes, so that they can be read in wide loads.
    row = triton.cdiv(width, 16) * 16
    out = torch.empty(spans, width, row, device=x.device)
    block = 128 if width > 128 else min(64, power_of_two(width))
    blocks = triton.cdiv(width, block)
    with launching(x):
        _gram[(blocks, blocks, spans)](
            x, scale, mask.contiguous(), out, width, dim, *x.stride(), row, DISTANCE=distance, BLOCK=block,
            BD=min(64, power_of_two(dim)), num_warps=8 if block == 128 else 4, num_stages=3,
        )  # fmt: skip
    return out


def _exact_gram(x: Tensor, mask: Tensor, quality: Tensor | None, distance: bool) -> Tensor:
    """Return the same for float32, by the reference's own arithmetic: the tensor cores would round it to TF32."""
    x = unit(x) if quality is None else unit(x) * quality[..., None].float()
    out = x @ x.transpose(1, 2)
    if distance:
        out = (1 - out).masked_fill_(~mask[:, None], torch.inf)
        out.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return out


def group(spans: int, width: int) -> int:
    """Return how many spans go through the matrix at once; 0 where not even one does."""
    return min(spans, GRAM_LIMIT // (width * triton.cdiv(width, 16) * 16)) if width <= WIDTH_LIMIT else 0


def supports(x: Tensor, mask: Tensor, matrix: bool = False) -> bool:
    """Return whether the kernels take these shapes. matrix: they need the matrix of all pairs."""
    return x.shape[1] > 0 and x.shape[2] > 0 and (not matrix or group(mask.shape[0], mask.shape[1]) > 0)
