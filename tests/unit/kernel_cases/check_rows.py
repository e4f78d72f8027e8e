"""Merging and gathering: kernels against the torch ops. Run by test_kernels.py in a process of its own."""

from __future__ import annotations

import pytest
import torch

from mllm_squeeze import ops
from mllm_squeeze.ops import kernels
from mllm_squeeze.ops.kernels import gather, match

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(24, 3), (1, 1100)])
def test_merge_tokens(monkeypatch, dtype, tokens, dim):
    make = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, dim, generator=make).to(DEVICE, dtype)
    assign = torch.randint(-1, max(1, tokens // 3), (2, tokens), generator=make).to(DEVICE)
    weights = torch.rand(2, tokens, generator=make).to(DEVICE)
    got = match.merge_tokens(x, assign, weights)
    views = match.merge_tokens(x.transpose(1, 2).contiguous().transpose(1, 2), assign, weights)
    assert torch.equal(got, views)
    monkeypatch.setenv(kernels.SWITCH, "0")
    wanted = ops.merge_tokens(x, assign, weights)
    assert got.dtype == dtype
    # The sums differ in their last bit; half types may then round to either neighbour.
    assert torch.allclose(got, wanted, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
    untouched = ~ops.merge.is_target(assign)
    assert torch.equal(got[untouched], x[untouched])


def test_merging_all_into_one_and_none(monkeypatch):
    x = torch.randn(1, 100, 4, device=DEVICE)
    assign = torch.full((1, 100), 99, device=DEVICE)
    got = match.merge_tokens(x, assign, torch.full((1, 100), 1 / 100, device=DEVICE))
    assert torch.allclose(got[0, 99], x[0].mean(0), atol=1e-6)
    assert torch.equal(got[0, :99], x[0, :99])
    assert torch.equal(match.merge_tokens(x, assign * 0 - 1, torch.ones(1, 100, device=DEVICE)), x)


def test_the_op_takes_the_kernel_where_no_gradient_is_wanted(monkeypatch):
    seen = []
    original = match.merge_tokens
    monkeypatch.setattr(match, "merge_tokens", lambda *a: seen.append(1) or original(*a))
    x, assign = torch.randn(1, 6, 3, device=DEVICE), torch.tensor([[0, 0, 2, 2, -1, 5]], device=DEVICE)
    weights = torch.ones(1, 6, device=DEVICE)
    plain = ops.merge_tokens(x, assign, weights)
    assert len(seen) == 1
    x.requires_grad_()
    graded = ops.merge_tokens(x, assign, weights)
    assert len(seen) == 1 and graded.requires_grad and torch.allclose(plain, graded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_gather_together(monkeypatch, dtype, shared):
    batch, tokens, kept = 2, 30, 11
    make = torch.Generator().manual_seed(3)
    lead = 1 if shared else batch
    hidden = torch.randn(batch, tokens, 70, generator=make).to(DEVICE, dtype)
    cos, sin = torch.randn(2, 3, lead, tokens, 8, generator=make).to(DEVICE)
    flat = torch.randn(lead, tokens, 8, generator=make).to(DEVICE)
    positions = torch.randint(0, 99, (3, lead, tokens), generator=make).to(DEVICE)
    row = torch.randint(0, 99, (lead, tokens), generator=make).to(DEVICE)
    index = torch.rand(batch, tokens, generator=make).argsort(1)[:, :kept].to(DEVICE)
    groups = [(hidden, cos, sin, positions), (hidden[..., ::2], flat, row, row > 50), (row,), (positions, hidden)]
    seen = []
    original = gather.gather_together
    monkeypatch.setattr(gather, "gather_together", lambda *a: seen.append(1) or original(*a))
    got = [ops.gather_together(index, tensors) for tensors in groups]
    # A first tensor of integers, and five tensors, take the torch op.
    many = ops.gather_together(index, (hidden, cos, sin, flat, row))
    assert len(seen) == 2
    got.append(gather.gather_together(index, (row, positions)))
    groups.append((row, positions))
    monkeypatch.setenv(kernels.SWITCH, "0")
    for tensors, taken in zip(groups, got, strict=True):
        for one, other in zip(taken, ops.gather_together(index, tensors), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    assert torch.equal(many[0], got[0][0]) and len(many) == 5


def test_gather_keeps_gradients_by_the_torch_op():
    hidden = torch.randn(1, 4, 2, device=DEVICE, requires_grad=True)
    (taken,) = ops.gather_together(torch.tensor([[1, 3]], device=DEVICE), (hidden,))
    taken.sum().backward()
    assert hidden.grad[0, :, 0].tolist() == [0, 1, 0, 1]
    with torch.no_grad():
        assert not ops.gather_together(torch.tensor([[1]], device=DEVICE), (hidden,))[0].requires_grad
