"""Attention received by each key, in two launches and O(L) memory.

The column sums of a softmax need each row's normaliser before a column can be summed. The first launch walks the keys
once per block of rows and keeps log sum exp of each row (online, as FlashAttention does). The second gives each block
of keys to one program, which walks the rows, recomputes the logits and adds weight * exp(logit - log sum exp) to its
own columns. No atomics: each output has one writer and one order, so two runs give the same bits.

The rows of all query heads that share a key head are interleaved into one list, row * heads per group + head. A block
of keys is thus read once per group, never repeated, and one block of the list spans few neighbouring rows. What a row
may see is a band of keys [low, high), both ascending over rows: causal masks, sliding windows and packed sequences
are all of this form, and a block skips what lies outside the band. Any other mask is read as it is.
"""

# Triton functions have no types of ours.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, power_of_two, precision, readable

# Programs that keep a large GPU busy; fewer rows than that are split along the keys.
_BUSY = 256
_MAX_DIM = 256


@triton.jit
def _logits(
    q, k, cols, rows, live, low, high, allowed, stride_row, stride_col, stop, scaling, softcap,
    BAND: tl.constexpr, ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = tl.dot(q, k, input_precision=PRECISION) * scaling
    if SOFTCAP:
        s = softcap * (1 - 2 / (tl.exp(2 * s / softcap) + 1))  # tanh
    seen = live[:, None] & (cols < stop)[None, :]
    if BAND:
        seen = seen & (cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None])
    if ALLOWED:
        place = rows.to(tl.int64)[:, None] * stride_row + cols[None, :] * stride_col
        seen = seen & (tl.load(allowed + place, mask=seen, other=0) != 0)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _load_rows(
    query, weight, low, high, pairs, first_head, R, d, width, G: tl.constexpr, D: tl.constexpr,
    stride_head, stride_row, stride_dim, BAND: tl.constexpr,
):  # fmt: skip
    """Return rows, weights, who counts, band and queries of some (row, head) pairs of a group."""
    rows = pairs // G
    inside = rows < R
    weights = tl.load(weight + rows, mask=inside, other=0.0)
    # Rows of no weight may hold anything, even NaN (padding).
    live = inside & (weights != 0)
    dims = tl.arange(0, D)
    place = (first_head + pairs % G)[:, None] * stride_head + rows[:, None] * stride_row
    mask = live[:, None] & (dims < d)[None, :]
    q = tl.load(query + place + dims[None, :] * stride_dim, mask=mask, other=0.0)
    lows, highs = rows, rows
    if BAND:
        lows = tl.load(low + rows, mask=live, other=width)
        highs = tl.load(high + rows, mask=live, other=0)
    return rows, weights, live, lows, highs, q


@triton.jit
def _row_sums(
    query, key, weight, low, high, allowed, lse,
    qb, qh, qr, qd, kb, kh, kn, kd, wb, bb, ab, ar, ac,
    R, P, d, groups, split_width, scaling, softcap,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BAND: tl.constexpr, ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    which, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    batch, group = which // groups, which % groups
    pairs = tl.program_id(1) * BM + tl.arange(0, BM)
    rows, _, live, lows, highs, q = _load_rows(
        query + batch * qb, weight + batch * wb, low + batch * bb, high + batch * bb, pairs, group * G,
        R, d, P, G, D, qh, qr, qd, BAND,
    )  # fmt: skip
    start = split * split_width
    stop = tl.minimum(P, start + split_width)
    if BAND:
        start = tl.maximum(start, tl.min(lows, 0))
        stop = tl.minimum(stop, tl.max(highs, 0))
    dims = tl.arange(0, D)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for n in range(start, stop, BN):
        cols = n + tl.arange(0, BN)
        place = key + batch * kb + group * kh + cols[None, :] * kn + dims[:, None] * kd
        k = tl.load(place, mask=(cols < stop)[None, :] & (dims < d)[:, None], other=0.0)
        s = _logits(
            q, k, cols, rows, live, lows, highs, allowed + batch * ab, ar, ac, stop, scaling, softcap,
            BAND, ALLOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        top = higher
    out = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse + (split * tl.num_programs(0) + which) * (R * G) + pairs, out, mask=pairs < R * G)


@triton.jit
def _column_sums(
    query, key, weight, low, high, allowed, lse, first_row, last_row, out,
    qb, qh, qr, qd, kb, kh, kn, kd, wb, bb, ab, ar, ac, fb,
    R, P, d, groups, scaling, softcap,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BAND: tl.constexpr, ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0).to(tl.int64)
    batch, group = which // groups, which % groups
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    dims = tl.arange(0, D)
    place = key + batch * kb + group * kh + cols[None, :] * kn + dims[:, None] * kd
    k = tl.load(place, mask=(cols < P)[None, :] & (dims < d)[:, None], other=0.0)
    start, stop = 0, R * G
    if BAND:
        start = tl.load(first_row + batch * fb + tl.program_id(1)) * G
        stop = tl.load(last_row + batch * fb + tl.program_id(1)) * G
    total = tl.zeros((BN,), tl.float32)
    for m in range(start, stop, BM):
        pairs = m + tl.arange(0, BM)
        rows, weights, live, lows, highs, q = _load_rows(
            query + batch * qb, weight + batch * wb, low + batch * bb, high + batch * bb, pairs, group * G,
            R, d, P, G, D, qh, qr, qd, BAND,
        )  # fmt: skip
        s = _logits(
            q, k, cols, rows, live, lows, highs, allowed + batch * ab, ar, ac, P, scaling, softcap,
            BAND, ALLOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
        norm = tl.load(lse + which * (R * G) + pairs, mask=live, other=0.0)
        # A row that sees nothing has -inf here, and -inf - -inf would be NaN.
        norm = tl.where(norm == float("-inf"), 0.0, norm)
        total += tl.sum(tl.exp(s - norm[:, None]) * weights[:, None], 0)
    tl.store(out + which * P + cols, total, mask=cols < P)


def supports(query: Tensor, key: Tensor, allowed: Tensor | None) -> bool:
    """Return whether the kernels take these: head size up to 256, equal dtypes, one mask for all heads."""
    fits = query.shape[-1] <= _MAX_DIM and query.dtype == key.dtype and query.numel() > 0 and key.numel() > 0
    return fits and (allowed is None or (allowed.dtype == torch.bool and allowed.shape[1] == 1))


def attention_from_rows(
    query: Tensor,
    key: Tensor,
    row_weights: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    band: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return float32 (B, P), mean over heads and weighted sum over rows; arguments as in `ops.attention_from_rows`."""
    query, key = readable(query), readable(key)
    batch, heads, rows, dim = query.shape
    groups, width = key.shape[1], key.shape[2]
    share = heads // groups
    weights = row_weights.float().expand(batch, rows).contiguous()
    size = power_of_two(dim)
    many = batch * groups
    # The side that a program owns is the wide one: what it walks over is read again by every program.
    bm, bn, warps = _tile(query, size, rows * share, many)
    column_bn, column_bm, column_warps = _tile(query, size, width, many)
    low, high, first, last = _band_blocks(band, batch, width, column_bn, weights)
    seen = weights if allowed is None else allowed.expand(batch, 1, rows, width)
    strides = (0, 0, 0) if allowed is None else (seen.stride(0), seen.stride(2), seen.stride(3))
    shared = (*query.stride(), *key.stride(), weights.stride(0), low.stride(0), *strides)
    options = {
        "G": share, "D": size, "BAND": band is not None, "ALLOWED": allowed is not None,
        "SOFTCAP": softcap is not None, "PRECISION": precision(query), "num_stages": 2,
    }  # fmt: skip
    numbers = (float(scaling), float(softcap or 0.0))
    blocks, row_blocks = triton.cdiv(width, bn), triton.cdiv(rows * share, bm)
    splits = max(1, min(_BUSY // (many * row_blocks), blocks // 4))
    split_width = triton.cdiv(blocks, splits) * bn
    lse = torch.empty(splits, many, rows * share, device=query.device)
    out = torch.empty(batch, groups, width, device=query.device)
    with launching(query):
        _row_sums[(many, row_blocks, splits)](
            query, key, weights, low, high, seen, lse, *shared, rows, width, dim, groups, split_width, *numbers,
            BM=bm, BN=bn, num_warps=warps, **options,
        )  # fmt: skip
        lse = lse[0] if splits == 1 else lse.logsumexp(0)
        _column_sums[(many, triton.cdiv(width, column_bn))](
            query, key, weights, low, high, seen, lse, first, last, out, *shared, first.stride(0),
            rows, width, dim, groups, *numbers, BM=column_bm, BN=column_bn, num_warps=column_warps, **options,
        )  # fmt: skip
    return out.sum(1) / heads


def _tile(query: Tensor, size: int, owned: int, many: int) -> tuple[int, int, int]:
    """Return the block a program owns of `owned` rows or keys, the block it walks in, and its warps."""
    half = query.element_size() == 2
    if half and size <= 128 and owned >= 128 and many * triton.cdiv(owned, 128) >= 128:
        return 128, 64, 8
    if size * query.element_size() <= 256:
        return min(64, power_of_two(owned)), 64, 4
    return min(64 if half else 32, power_of_two(owned)), 32, 4


def _band_blocks(
    band: tuple[Tensor, Tensor] | None, batch: int, width: int, block: int, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return int32 low, high (B, R) and, per block of keys, the first row and one past the last row that see it."""
    if band is None:
        return unused, unused, unused, unused
    low, high = (side.int().expand(batch, -1).contiguous() for side in band)
    edges = torch.arange(0, width, block, device=low.device, dtype=torch.int32).expand(batch, -1).contiguous()
    first = torch.searchsorted(high, edges, right=True, out_int32=True)
    last = torch.searchsorted(low, edges + block, out_int32=True)
    return low, high, first, last
