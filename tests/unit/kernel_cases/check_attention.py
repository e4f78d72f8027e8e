"""Attention received: kernels against the blockwise torch op. Run by test_kernels.py in a process of its own."""

from __future__ import annotations

import pytest
import torch

from mllm_squeeze import ops
from mllm_squeeze.ops import kernels
from mllm_squeeze.ops.kernels import attention as fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIG = DEVICE == "cuda"


def states(batch, heads, groups, rows, keys, dim, dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, dim, generator=make) * 2
    key = torch.randn(batch, groups, keys, dim, generator=make) * 2
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype)


@pytest.fixture
def agree(monkeypatch):
    """Compare the kernel with the torch op, relative to the largest score; on a GPU two runs give the same bits."""

    def check(query, key, weights, allowed=None, scaling=0.1, softcap=None, band=None):
        got = fast.attention_from_rows(query, key, weights, allowed, scaling, softcap, band)
        if BIG:
            again = fast.attention_from_rows(query, key, weights, allowed, scaling, softcap, band)
            assert torch.equal(got, again)
        monkeypatch.setenv(kernels.SWITCH, "0")
        wanted = ops.attention_from_rows(query, key, weights, allowed, scaling, softcap, None, band)
        monkeypatch.undo()
        assert got.dtype == torch.float32 and wanted.abs().max() > 0
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        return got

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "groups", "rows", "keys", "dim"),
    [(2, 2, 70, 70, 16), (6, 2, 35, 97, 24), (4, 1, 1, 140, 80), (2, 2, 3, 5, 8)],
)
def test_all_shapes(agree, dtype, heads, groups, rows, keys, dim):
    query, key = states(2, heads, groups, rows, keys, dim, dtype)
    agree(query, key, torch.rand(2, rows, device=DEVICE) + 0.1)


def test_views_need_no_copy(agree):
    query, key = states(2, 40, 40, 4, 2, 16)
    agree(query.transpose(1, 2), key.permute(0, 2, 1, 3).repeat(1, 1, 1, 1), torch.ones(2, 40, device=DEVICE))


def test_causal_windows_and_packed_sequences_skip_what_they_do_not_see(agree):
    query, key = states(2, 2, 1, 150, 150, 16)
    weights = torch.ones(2, 150, device=DEVICE)
    packed = torch.tensor([0, 5, 70, 71, 150], device=DEVICE, dtype=torch.int32)
    for band in (
        ops.attention_band(150, 150, like=query),
        ops.attention_band(150, 150, window=20, like=query),
        ops.attention_band(150, 150, causal=False, cu_seqlens=packed),
    ):
        got = agree(query, key, weights, band=band)
        # Each row gives its heads' mean of 1 to the keys it sees.
        assert torch.allclose(got.sum(1), torch.full((2,), 150.0, device=DEVICE), rtol=1e-5)
    query, key = states(1, 4, 2, 30, 110, 16)
    agree(query, key, torch.ones(1, 30, device=DEVICE), band=ops.attention_band(30, 110, like=query))


def test_what_lies_outside_the_band_is_not_read(agree):
    query, key = states(1, 2, 2, 20, 200, 16)
    low, high = torch.zeros(1, 20, device=DEVICE), torch.full((1, 20), 100, device=DEVICE)
    clean = agree(query, key, torch.ones(1, 20, device=DEVICE), band=(low, high))
    key[:, :, 128:] = float("nan")
    dirty = fast.attention_from_rows(query, key, torch.ones(1, 20, device=DEVICE), None, 0.1, None, (low, high))
    assert torch.equal(clean[:, :100], dirty[:, :100]) and not dirty[:, 100:128].any()


def test_masks_and_rows_of_no_weight(agree):
    query, key = states(2, 4, 2, 33, 90, 16)
    weights = torch.rand(2, 33, device=DEVICE)
    weights[0, 5], weights[1, 20:] = 0, 0
    padding = torch.rand(2, 1, 1, 90, device=DEVICE) > 0.3
    dense = torch.rand(2, 1, 33, 90, device=DEVICE) > 0.5
    dense[0, 0, 7] = False  # a row that sees nothing gives nothing
    band = ops.attention_band(33, 90, like=query)
    for allowed, limits in ((padding, None), (padding[:1], band), (dense, None), (dense[:1], band)):
        agree(query, key, weights, allowed, band=limits)
    clean = agree(query, key, weights)
    query[0, :, 5] = float("nan")
    assert torch.equal(agree(query, key, weights), clean)


def test_softcap(agree):
    query, key = states(1, 2, 1, 20, 50, 16, torch.bfloat16)
    agree(query, key, torch.ones(1, 20, device=DEVICE), softcap=5.0, scaling=1.0)


def test_large_logits_stay_finite(agree):
    query, key = states(1, 2, 2, 9, 100, 16)
    got = agree(query * 30, key * 30, torch.ones(1, 9, device=DEVICE), scaling=1.0)
    assert got.isfinite().all()


def test_the_ops_take_the_kernel(monkeypatch):
    query, key = states(1, 4, 2, 20, 50, 16, torch.bfloat16)
    seen = []
    original = fast.attention_from_rows
    monkeypatch.setattr(fast, "attention_from_rows", lambda *a: seen.append(1) or original(*a))
    got = ops.attention_received(query, key, None, 0.1)
    assert seen and torch.allclose(got.sum(), torch.tensor(80.0, device=DEVICE))
    ops.attention_received(query.double(), key.double(), None, 0.1)
    wide, keys = states(1, 1, 1, 2, 2, 300)
    ops.attention_received(wide, keys, None, 0.1)
    per_head = torch.rand(1, 2, 20, 50, device=DEVICE) > 0.5
    ops.attention_received(query, key, per_head, 0.1)
    assert len(seen) == 1


@pytest.mark.skipif(not BIG, reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 72, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_real_models(agree, dim, dtype):
    query, key = states(1, 16, 4, 2880, 2880, dim, dtype)
    agree(query, key, torch.ones(1, 2880, device=DEVICE), band=ops.attention_band(2880, 2880, like=query))
    agree(query[:, :, -3:], key, torch.ones(1, 3, device=DEVICE))
