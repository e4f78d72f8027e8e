"""Greedy choices and matches: kernels against the torch ops. Run by test_kernels.py in a process of its own."""

from __future__ import annotations

import pytest
import torch

from mllm_squeeze import ops
from mllm_squeeze.ops import kernels
from mllm_squeeze.ops.kernels import cover, gram, greedy, match, turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIG = DEVICE == "cuda"
DTYPES = [torch.float32, torch.bfloat16]


def features(spans, tokens, dim, dtype=torch.float32, seed=0):
    x = torch.randn(spans, tokens, dim, generator=torch.Generator().manual_seed(seed)) + 0.3
    return x.to(DEVICE, dtype)


def ragged(*lengths):
    return torch.arange(max(lengths), device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


@pytest.fixture
def reference(monkeypatch):
    def call(op, *args, **kwargs):
        monkeypatch.setenv(kernels.SWITCH, "0")
        out = op(*args, **kwargs)
        monkeypatch.undo()
        return out

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1 << 28, 7000, 1])
@pytest.mark.parametrize("seed", range(2))
def test_farthest_point(reference, monkeypatch, dtype, limit, seed):
    """All three ways: one matrix, one span at a time, rows when they are needed."""
    lengths, k = (50, 37, 1, 8), torch.tensor([12, 5, 3, 8], device=DEVICE)
    x, mask = features(4, 50, 40, dtype, seed), ragged(*lengths)
    x[~mask] = 7
    wanted = reference(ops.farthest_point, x, mask, k, 12)
    monkeypatch.setattr(gram, "GRAM_LIMIT", limit)
    got = greedy.farthest_point(x, mask, k, 12)
    assert torch.equal(got, wanted)
    assert got.sum(1).tolist() == [12, 5, 1, 8]


@pytest.mark.parametrize("limit", [1 << 28, 1])
def test_farthest_point_with_holes_duplicates_and_zeros(reference, monkeypatch, limit):
    monkeypatch.setattr(gram, "GRAM_LIMIT", limit)
    x, mask = features(1, 30, 16), torch.rand(1, 30, generator=torch.Generator().manual_seed(1)) > 0.3
    mask = mask.to(DEVICE)
    k = torch.tensor([9], device=DEVICE)
    assert torch.equal(greedy.farthest_point(x, mask, k, 9), reference(ops.farthest_point, x, mask, k, 9))
    same = torch.zeros(1, 8, 4, device=DEVICE)
    same[..., 0] = 1
    keep = greedy.farthest_point(same, ragged(8), torch.tensor([3], device=DEVICE), 3)
    assert keep[0].tolist() == [True] * 3 + [False] * 5
    keep = greedy.farthest_point(same * 0, ragged(8), torch.tensor([2], device=DEVICE), 2)
    assert keep[0].tolist() == [True] * 2 + [False] * 6


def test_nan_does_not_lead_outside():
    x = features(2, 20, 8)
    x[0, 3] = float("nan")
    keep = greedy.farthest_point(x, ragged(20, 20), torch.tensor([4, 4], device=DEVICE), 4)
    assert keep[1].sum() == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1 << 28, 7000])
def test_dpp_map(reference, monkeypatch, dtype, limit):
    x, mask = features(3, 50, 40, dtype), ragged(50, 23, 1)
    k = torch.tensor([14, 6, 2], device=DEVICE)
    quality = torch.rand(3, 50, generator=torch.Generator().manual_seed(5)).to(DEVICE) + 0.1
    wanted = [reference(ops.dpp_map, x, mask, k, 14, q) for q in (None, quality)]
    monkeypatch.setattr(gram, "GRAM_LIMIT", limit)
    got = [greedy.dpp_map(x, mask, k, 14, q) for q in (None, quality)]
    assert [torch.equal(a, b) for a, b in zip(got, wanted, strict=True)] == [True, True]
    assert not torch.equal(*got)


def test_dpp_map_when_all_is_explained(reference):
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0]]], device=DEVICE)
    k = torch.tensor([4], device=DEVICE)
    got = greedy.dpp_map(x, ragged(5), k, 4)
    assert got[0].tolist() == [True, True, True, True, False]
    assert torch.equal(got, reference(ops.dpp_map, x, ragged(5), k, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1 << 28, 7000])
def test_facility_location(reference, monkeypatch, dtype, limit):
    x, mask = features(3, 50, 40, dtype), ragged(50, 23, 1)
    x[~mask] = float("nan")
    k = torch.tensor([14, 6, 2], device=DEVICE)
    bonus = torch.rand(3, 50, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    wanted = [reference(ops.facility_location, x, mask, k, 14, b) for b in (None, bonus)]
    monkeypatch.setattr(gram, "GRAM_LIMIT", limit)
    got = [ops.facility_location(x, mask, k, 14, b) for b in (None, bonus)]
    assert [torch.equal(a, b) for a, b in zip(got, wanted, strict=True)] == [True, True]
    assert got[0].sum(1).tolist() == [14, 6, 1]
    assert not torch.equal(*got)


def test_pivots_in_turns(reference):
    seed = torch.Generator().manual_seed(3)
    # Many ties, zeros of both signs, and what is no number.
    alike = (torch.randint(-4, 5, (3, 5, 70), generator=seed) * torch.tensor([1.0, -1.0]).repeat(35)).to(DEVICE)
    alike[0, 2, 3:9] = float("nan")
    alike[1, 0, 5], alike[1, 0, 6] = float("inf"), -float("inf")
    there, mask = torch.rand(3, 5, generator=seed) > 0.2, ragged(70, 33, 2)
    for totals in ([40, 12, 9], [0, 33, 1]):
        arguments = (mask, [alike[:, :2], alike[:, 2:]], [there.to(DEVICE)], torch.tensor(totals, device=DEVICE))
        wanted = reference(ops.least_alike_in_turns, *arguments)
        got = ops.least_alike_in_turns(*arguments)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(90, 24), (200, 8), (2, 70)])
def test_best_target(reference, dtype, tokens, dim):
    x, mask = features(2, tokens, dim, dtype), ragged(tokens, max(1, tokens // 3))
    half = (tokens + 1) // 2
    source, _ = ops.compact_indices(mask, half)
    target, real = ops.compact_indices(mask.flip(1) & mask, half)
    from mllm_squeeze.ops.merge import _best_target

    wanted, column = reference(_best_target, x, source, target, real)
    best, found = match.best_target(x, source, target, real)
    assert torch.allclose(best, wanted.float(), atol=2e-6, rtol=0)
    assert torch.equal(found, column)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ops_take_the_kernels(reference, monkeypatch, dtype):
    x, mask = features(3, 61, 20, dtype), ragged(61, 40, 3)
    r = torch.tensor([17, 20, 9], device=DEVICE)
    targets = torch.arange(61, device=DEVICE)[None] % 7 == 0
    seen = []
    alike = ops.cosine(x[:, :4], x)
    taken = (match, "best_target"), (greedy, "farthest_point"), (cover, "facility_location")
    for module, name in (*taken, (turns, "least_alike_in_turns"), (greedy, "dpp_map")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: seen.append(n) or f(*a))
    with monkeypatch.context() as patch:
        patch.setenv(kernels.SWITCH, "0")
        calls = [
            (ops.bipartite_match, (x, mask, r, 1)),
            (ops.nearest_target, (x, targets & mask, mask, 9)),
            (ops.farthest_point, (x, mask, r, 20)),
            (ops.facility_location, (x, mask, r, 20)),
            (ops.least_alike_in_turns, (mask, [alike], [mask[:, :4]], r)),
            (ops.dpp_map, (x, mask, r, 20)),
        ]
        wanted = [op(*args) for op, args in calls]
        assert not seen
    got = [op(*args) for op, args in calls]
    assert seen == ["best_target", *(name for _, name in taken), "least_alike_in_turns", "dpp_map"]
    # The last takes as many picks as there are dimensions, and what variance is left then is a matter of rounding.
    assert all(torch.equal(a, b) for a, b in zip(got[:5], wanted[:5], strict=True))


@pytest.mark.skipif(not BIG, reason="needs a GPU")
@pytest.mark.parametrize(("tokens", "dim", "kept"), [(576, 4096, 64), (2880, 3584, 288), (8192, 1024, 800)])
def test_sizes_of_real_models(reference, tokens, dim, kept):
    x, mask, k = features(2, tokens, dim, torch.bfloat16), ragged(tokens, tokens - 7), torch.tensor([kept, kept // 2])
    k = k.to(DEVICE)
    assert torch.equal(greedy.farthest_point(x, mask, k, kept), reference(ops.farthest_point, x, mask, k, kept))
    assert torch.equal(ops.facility_location(x, mask, k, kept), reference(ops.facility_location, x, mask, k, kept))
    turns_of = (mask, [ops.cosine(x[:, :8], x)], [mask[:, :8]], k)
    assert torch.equal(ops.least_alike_in_turns(*turns_of), reference(ops.least_alike_in_turns, *turns_of))
    keys = x[..., :64]
    assert torch.equal(ops.bipartite_match(keys, mask, k), reference(ops.bipartite_match, keys, mask, k))
