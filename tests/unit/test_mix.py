"""A token that goes into several survivors: sparse entries against a literal loop, and against one survivor each."""

from __future__ import annotations

import pytest
import torch

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Mix, Reduction

S, N, D = 3, 11, 5


def one_hot(assign, weights):
    """The entries that say what assign and weights say."""
    span, source = (assign >= 0).nonzero(as_tuple=True)
    return Mix(span, assign[span, source], source, weights[span, source])


def random_assign(seed):
    torch.manual_seed(seed)
    keep = torch.rand(S, N) < 0.4
    keep[:, 0] = True
    assign = torch.full((S, N), -1)
    for s in range(S):
        survivors = keep[s].nonzero()[:, 0]
        for n in range(N):
            drawn = survivors[torch.randint(len(survivors), (1,))].item()
            assign[s, n] = n if keep[s, n] else (-1 if torch.rand(1) < 0.2 else drawn)
    return keep, assign


@pytest.mark.parametrize("seed", range(3))
def test_one_survivor_each_is_the_plain_assignment(seed):
    keep, assign = random_assign(seed)
    x, size = torch.randn(S, N, D), torch.randint(1, 5, (S, N)).float()
    weights = ops.mean_weights(assign, size)
    plain, mixed = Reduction(keep, assign, weights), Reduction(keep, mix=one_hot(assign, weights))
    torch.testing.assert_close(plain.states(x)[keep], mixed.states(x)[keep])
    torch.testing.assert_close(plain.sizes(size)[keep], mixed.sizes(size)[keep])
    assert torch.equal(plain.targets(), mixed.targets())
    assert plain.merges
    assert mixed.merges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlaps_are_the_literal_sum(dtype):
    torch.manual_seed(0)
    entries = [(s, i, n, float(torch.randn(()))) for s in range(S) for i in (0, 4, 7) for n in range(N) if (i + n) % 2]
    span, into, source = (torch.tensor([e[k] for e in entries]) for k in range(3))
    weight = torch.tensor([e[3] for e in entries])
    x, size = torch.randn(S, N, D).to(dtype), torch.randint(1, 5, (S, N)).float()
    states, total = x.float().clone(), size.clone()
    for s in range(S):
        for i in (0, 4, 7):
            mine = [(n, w) for t, j, n, w in entries if (t, j) == (s, i)]
            states[s, i] = sum(w * x[s, n].float() for n, w in mine)
            every = {n: sum(abs(w) for t, _, m, w in entries if (t, m) == (s, n)) for n, _ in mine}
            total[s, i] = sum(size[s, n] * abs(w) / every[n] for n, w in mine)
    torch.testing.assert_close(ops.mix_tokens(x, span, into, source, weight), states.to(dtype))
    torch.testing.assert_close(ops.mixed_size(size, span, into, source, weight), total)
    keep = torch.zeros(S, N, dtype=torch.bool)
    keep[:, [0, 4, 7]] = True
    target = ops.strongest_target(keep, span, into, source, weight)
    for s in range(S):
        for n in range(N):
            mine = sorted((-abs(w), j) for t, j, m, w in entries if (t, m) == (s, n))
            assert target[s, n] == (n if keep[s, n] else mine[0][1] if mine else -1)


def test_gradients_reach_every_giver():
    x = torch.randn(1, 4, 3, requires_grad=True)
    mix = Mix(torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]), torch.ones(3))
    Reduction(torch.tensor([[True, False, True, False]]), mix=mix).states(x)[:, [0, 2]].sum().backward()
    assert (x.grad != 0).all(-1).tolist() == [[True, True, False, False]]


def test_sizes_are_neither_lost_nor_made():
    torch.manual_seed(1)
    size = torch.randint(1, 5, (1, 6)).float()
    source = torch.arange(6).repeat(2)
    into = torch.tensor([0] * 6 + [3] * 6)
    out = ops.mixed_size(size, torch.zeros(12, dtype=torch.long), into, source, torch.rand(12))
    torch.testing.assert_close(out[0, [0, 3]].sum(), size.sum())


@pytest.mark.parametrize("entries", [10, 400])
def test_many_entries_and_few_give_the_same_sums(entries: int) -> None:
    """Where there are many, a matrix of all pairs takes the place of the rows of all entries."""
    draw = torch.Generator().manual_seed(entries)
    x = torch.randn(2, 12, 5, generator=draw, requires_grad=True)
    span, into, source = (torch.randint(0, most, (entries,), generator=draw) for most in (2, 11, 11))
    weight = torch.randn(entries, generator=draw, requires_grad=True)
    with torch.no_grad():
        x[:, 11] = float("nan")  # padding, which gives nothing
    found = ops.mix_tokens(x, span, into, source, weight)
    wanted = x.detach().clone()
    for row, to in {(int(s), int(i)) for s, i in zip(span, into, strict=True)}:
        parts = [e for e in range(entries) if (int(span[e]), int(into[e])) == (row, to)]
        wanted[row, to] = sum(weight[e].detach() * x[row, source[e]].detach() for e in parts)
    torch.testing.assert_close(found[:, :11], wanted[:, :11], atol=1e-5, rtol=1e-5)
    assert found[:, 11].isnan().all()
    found[:, :11].sum().backward()
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(weight.grad, x.detach()[span, source].sum(1), atol=1e-5, rtol=1e-5)
    assert x.grad[:, :11].isfinite().all()
