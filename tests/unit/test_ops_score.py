"""Attention scores against the full map, and cosine similarities."""

from __future__ import annotations

import pytest
import torch
from reference import rules

from mllm_squeeze import ops


def full_map(query, key, allowed, scaling, softcap=None):
    """The whole (B, H, R, P) map in float64, with the keys repeated."""
    batch, heads, rows, _ = query.shape
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    logits = query.double() @ key.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if allowed is not None:
        logits = logits.masked_fill(~allowed.expand(batch, 1, rows, key.shape[2]), -torch.inf)
    return logits.softmax(-1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_rows_against_the_full_map(kv_heads, block, softcap):
    torch.manual_seed(kv_heads)
    query, key = torch.randn(3, 6, 7, 8), torch.randn(3, kv_heads, 20, 8)
    weights = torch.rand(3, 7)
    weights[0, 2:] = 0
    causal = torch.arange(20)[None] <= torch.arange(13, 20)[:, None]
    real = torch.ones(3, 1, 1, 20, dtype=torch.bool)
    real[1, ..., :5] = False
    for allowed in (None, causal[None, None], real, causal & real):
        expected = torch.einsum("bhrp,br->bp", full_map(query, key, allowed, 0.35, softcap), weights.double()) / 6
        got = ops.attention_from_rows(query, key, weights, allowed, 0.35, softcap, block)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [None, 2])
def test_received_is_the_sum_of_columns(block):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 5), torch.randn(2, 2, 9, 5)
    rows = torch.ones(2, 9, dtype=torch.bool)
    rows[1, 6:] = False
    allowed = rows[:, None, None]
    expected = (full_map(query, key, allowed, 0.5) * rows[:, None, :, None]).sum((1, 2))
    got = ops.attention_received(query, key, allowed, 0.5, row_mask=rows, block=block)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    everything = ops.attention_received(query, key, None, 0.5, block=block)
    assert everything.sum().item() == pytest.approx(2 * 4 * 9, rel=1e-5)


def test_padding_may_hold_anything():
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    weights, allowed = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[False, True, True, True, True]])[None, None]
    clean = ops.attention_from_rows(query, key, weights, allowed, 0.5)
    query[:, :, 0] = float("nan")
    key[:, :, 0] = float("nan")
    dirty = ops.attention_from_rows(query, key, weights, allowed, 0.5)
    assert torch.equal(clean, dirty)
    assert dirty[0, 0] == 0
    blind = allowed.expand(1, 1, 3, 5).clone()
    blind[:, :, 1] = False  # a row that may see nothing gives nothing
    assert ops.attention_from_rows(query, key, weights, blind, 0.5).sum().item() == pytest.approx(0.5, rel=1e-5)


def test_low_precision_inputs_are_scored_in_float32():
    torch.manual_seed(1)
    query, key = torch.randn(1, 2, 3, 64).bfloat16(), torch.randn(1, 1, 40, 64).bfloat16()
    got = ops.attention_from_rows(query, key, torch.ones(1, 3) / 3, None, 0.125)
    expected = full_map(query, key, None, 0.125).mean((1, 2))
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, ops.attention_from_rows(query, key, torch.ones(1, 3) / 3, None, 0.125))


def test_memory_is_bounded_by_the_block(monkeypatch):
    """No intermediate is larger than one block of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    query, key = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
    with Watch():
        ops.attention_received(query, key, None, 0.3, block=4)
    assert largest <= 4 * 4 * 64


def test_cosine_and_relevance():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    b[0, 0] = 0
    got = ops.cosine(a.bfloat16(), b)
    assert got.dtype == torch.float32
    assert (got[0, :, 0] == 0).all()
    expected = [[rules.cosine(x, y) for y in b[1].tolist()] for x in a[1].tolist()]
    torch.testing.assert_close(ops.cosine(a, b)[1], torch.tensor(expected))
    pairs = ops.paired_cosine(a, torch.tensor([[1, -1, 2], [0, 0, 0]]))
    assert pairs[0].tolist() == pytest.approx([rules.cosine(a[0, 0].tolist(), a[0, 1].tolist()), 0, 1], abs=1e-6)
    visual, text = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[2.0, 0], [0, 1], [0, 0]]])
    r = ops.text_relevance(visual, torch.ones(1, 2, dtype=torch.bool), text, torch.ones(1, 3, dtype=torch.bool))
    assert r[0].tolist() == pytest.approx([0.4995, 0.3413, 0.1592], abs=1e-4)


def test_gaussian_kernels():
    got = ops.gaussian_kernels(torch.tensor([0.0, 0.125, 0.5, 1.125]))
    assert got.tolist() == pytest.approx([5, 4.1765, 2.7710, 1.7658], abs=1e-4)


@pytest.mark.parametrize("over_rows", ["mean", "sum", "max", "each"])
@pytest.mark.parametrize("heads", ["mean", "sum", "max", "each"])
def test_joined_against_the_full_map(heads, over_rows):
    """Heads are joined first, then rows; rows that do not count may hold anything."""
    torch.manual_seed(3)
    query, key = torch.randn(2, 6, 7, 8), torch.randn(2, 3, 20, 8)
    there = torch.ones(2, 7, dtype=torch.bool)
    there[1, 4:] = False
    real = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    real[1, ..., :5] = False
    band = ops.attention_band(7, 20)
    causal = torch.arange(20)[None] <= torch.arange(13, 20)[:, None]
    maps = full_map(query, key, causal & real, 0.35, 3.0)
    maps[1, :, 4:] = 0
    join = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "each": lambda x, axis: x}
    expected = join[heads](maps, 1)
    if over_rows == "mean":
        expected = expected.sum(-2) / torch.tensor([7, 4]).view(2, *(1,) * (expected.ndim - 2))
    else:
        expected = join[over_rows](expected, -2)
    query[1, :, 4:] = torch.nan
    for block in (None, 3):
        got = ops.attention_joined(query, key, there, real, 0.35, 3.0, heads, over_rows, block, band)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)
    seen = (causal & real)[:, 0] & there[..., None]
    for block in (None, 3):
        assert torch.equal(ops.rows_that_see(there, 20, real, band, block), seen.sum(1).float())
