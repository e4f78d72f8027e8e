"""Rows of several tensors by one index in one launch: hidden states, rotary tables and positions of the survivors.

Each cut takes the same rows of four tensors, three of them small. One launch copies all: a program owns one survivor
and one stretch of its columns, reads the index once, and copies that stretch of each tensor that is wide enough.
Tensors are seen as (A, B, T, D), a broadcast batch has stride 0, and nothing is converted: what is written is bit-
equal.
"""

# Triton functions have no types of ours.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, power_of_two

SLOTS = 4


@triton.jit
def _copy(source, target, A, D, sa, sb, st, sd, batch, row, slot, B, M, column):
    inside = column < D
    for a in range(0, A):
        value = tl.load(source + a * sa + batch * sb + row * st + column * sd, mask=inside)
        tl.store(target + ((a * B + batch) * M + slot) * D + column, value, mask=inside)


@triton.jit
def _gather(
    index, B, M,
    s0, t0, A0, D0, sa0, sb0, st0, sd0, s1, t1, A1, D1, sa1, sb1, st1, sd1,
    s2, t2, A2, D2, sa2, sb2, st2, sd2, s3, t3, A3, D3, sa3, sb3, st3, sd3,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(index + batch * M + slot)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    _copy(s0, t0, A0, D0, sa0, sb0, st0, sd0, batch, row, slot, B, M, column)
    if COUNT > 1:
        _copy(s1, t1, A1, D1, sa1, sb1, st1, sd1, batch, row, slot, B, M, column)
    if COUNT > 2:
        _copy(s2, t2, A2, D2, sa2, sb2, st2, sd2, batch, row, slot, B, M, column)
    if COUNT > 3:
        _copy(s3, t3, A3, D3, sa3, sb3, st3, sd3, batch, row, slot, B, M, column)


def supports(tensors: Sequence[Tensor]) -> bool:
    """Return whether one launch takes these: one to four tensors, real, on one device, none empty."""
    devices = {tensor.device for tensor in tensors}
    real = all(not tensor.is_complex() and tensor.numel() for tensor in tensors)
    return 0 < len(tensors) <= SLOTS and len(devices) == 1 and real


def gather_together(index: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the rows of each tensor, as `ops.gather_together`; no gradients."""
    batch, kept = index.shape
    outputs, arguments, widest = [], [], 1
    for tensor in tensors:
        dim = tensor.shape[-1] if tensor.is_floating_point() else 1
        view = tensor if tensor.is_floating_point() else tensor[..., None]
        lead = view.shape[0] if view.dim() == 4 else 1
        view = view.expand(lead, batch, -1, -1)
        out = torch.empty(lead, batch, kept, dim, dtype=tensor.dtype, device=tensor.device)
        shape = (batch, kept, dim) if tensor.is_floating_point() else (batch, kept)
        axes = view.dim() == 4 and tensor.dim() == len(shape) + 1
        outputs.append(out.view(lead, *shape) if axes else out.view(shape))
        arguments.append((view, out, lead, dim, *view.stride()))
        widest = max(widest, dim)
    arguments += arguments[:1] * (SLOTS - len(arguments))
    block = min(1024, power_of_two(widest))
    with launching(index):
        _gather[(kept, batch, triton.cdiv(widest, block))](
            index.contiguous(), batch, kept, *(value for group in arguments for value in group),
            COUNT=len(tensors), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return tuple(outputs)
