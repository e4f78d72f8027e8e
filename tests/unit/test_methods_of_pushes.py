"""ZOO-Prune and what it is made of: a worked example by hand, and literal slow versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.build import circle, visual_tokens
from torch import Tensor, nn

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.layout import Tile
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.parts.score.fused import Fused
from mllm_squeeze.parts.score.norm import Norm
from mllm_squeeze.upstream.twins import in_float32


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projector(inner: int = 6, out: int = 5, seed: int = 3) -> Any:
    w1, w2 = noise(inner, 4, seed=seed), noise(out, inner, seed=seed + 1)
    return lambda x: torch.nn.functional.gelu(x @ w1.T.to(x)) @ w2.T.to(x)


def zoo(x: Tensor, moved: Tensor, **params: Any) -> list[int]:
    return squeeze.choose("zoo_prune", features=x, signals={"sensitivity": moved}, **params).kept.tolist()


# Pushes


@pytest.mark.parametrize("most", [1, 100, 1 << 24])
@pytest.mark.parametrize("lead", [(7,), (3, 7)])
def test_the_answer_to_pushes_is_its_loops(lead, most):
    x, directions, f = noise(*lead, 4), noise(5, 4, seed=1), projector()
    found = ops.push_response(x, f, directions, 0.01, most)
    flat, wanted = x.double().flatten(0, -2), []
    for token in flat:
        total = 0.0
        for u in directions.double():
            u = u / u.norm() * 0.01
            total += float((f(token + u) - f(token - u)).norm()) / 0.02
        wanted.append(total / 5)
    assert found.flatten().tolist() == pytest.approx(wanted, rel=1e-3)
    assert found.shape == lead and found.dtype == torch.float32


def test_of_a_linear_map_the_answer_is_the_length_of_what_it_makes_of_a_direction():
    """Along the first axis it triples, along the second it does nothing: (3 + 0) / 2."""
    found = ops.push_response(noise(4, 2), lambda x: x * torch.tensor([3.0, 0.0]), torch.eye(2) * 7, 0.5)
    assert found.tolist() == pytest.approx([1.5] * 4, abs=1e-5)


def test_tokens_that_are_joined_answer_together():
    """Two tokens make one, and both are pushed alike."""
    x = noise(6, 2)
    found = ops.push_response(x, lambda y: y.reshape(-1, 4), torch.tensor([[1.0, 0.0]]), 0.1)
    assert found.tolist() == pytest.approx([2**0.5] * 3, abs=1e-5)


def test_the_twin_of_a_module_has_no_hooks_and_computes_in_float32():
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Sequential(nn.Linear(6, 3))).bfloat16()
    called: list[int] = []
    for part in (module, module[0], module[2]):
        part.register_forward_hook(lambda *_: called.append(1))
        part.register_forward_pre_hook(lambda *_: called.append(1))
    before = {name: dict(part.__dict__) for name, part in module.named_modules()}
    x, twin = noise(5, 4), in_float32(module)
    found = twin(x)
    assert not called and found.dtype == torch.float32
    one, two = module[0], module[2][0]
    wanted = torch.nn.functional.gelu(x @ one.weight.float().T + one.bias.float()) @ two.weight.float().T
    assert torch.allclose(found, wanted + two.bias.float(), atol=1e-6)
    assert all(part.__dict__ == before[name] for name, part in module.named_modules())
    assert module(x.bfloat16()).dtype == torch.bfloat16 and len(called) == 6


# Scales of a group


def test_a_score_may_be_scaled_in_each_group():
    """Two groups of a padded batch, and a token of none."""
    x = [torch.tensor([1.0, 5, 3, 20, 10, 7])[:, None], torch.tensor([4.0, 2])[:, None]]
    tokens = visual_tokens(x, [1, 1])
    label = torch.tensor([[0, 0, 0, 1, 1, -1], [1, 1, -1, -1, -1, -1]])
    part = Fused(of=[{"score": Norm(), "normalise": "minmax"}], per="group")
    found = part.score(tokens, Groups(label, 2))
    assert found[0, :5].tolist() == [0, 1, 0.5, 1, 0] and found[1, :2].tolist() == [1, 0]
    whole = Fused(of=[{"score": Norm(), "normalise": "minmax"}]).score(tokens, Groups(label, 2))
    assert whole[0, :5].tolist() == pytest.approx([0, 4 / 19, 2 / 19, 1, 9 / 19])


# The method


def by_loops(z: Tensor, moved: Tensor, k: int) -> list[int]:
    low, high = float(moved.min()), float(moved.max())
    weight = [(float(m) - low) / (high - low + 1e-8) if high > low else 1.0 for m in moved]
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    order = [max(range(len(z)), key=lambda n: (weight[n], -n))]
    while len(order) < k:
        worth = {
            n: min(max(0.0, 1 - float(unit[n] @ unit[p])) for p in order) * weight[n]
            for n in range(len(z))
            if n not in order
        }
        order.append(max(worth, key=lambda n: (worth[n], -n)))
    return sorted(order)


def test_the_worked_example():
    x, moved = circle(0, 10, 60, 100), torch.tensor([2, 1.7, 1.1, 1.4])
    assert [zoo(x, moved, keep=k) for k in (1, 2, 3, 4)] == [[0], [0, 3], [0, 1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("count", [1, 2, 9, 23, 24])
def test_it_is_its_loops(count):
    x, moved = noise(24, 5), noise(24, seed=1).abs()
    assert zoo(x, moved, keep=count) == by_loops(x, moved, count)
    assert zoo(x, torch.ones(24), keep=count)[0] == 0, "all alike: the first is the first"


def test_each_crop_has_a_scale_and_a_share_of_its_own():
    x, scale = noise(36, 5), torch.tensor([1.0] * 12 + [100.0] * 24)
    moved = noise(36, seed=1).abs() * scale
    found = zoo(x, moved, keep=9, grid=[Tile(1, 3, 4), Tile(1, 6, 4)])
    wanted = [n + start for start in (0, 12, 24) for n in by_loops(x[start : start + 12], moved[start : start + 12], 3)]
    assert found == wanted


def test_separators_come_last():
    x, moved = noise(8, 5), noise(8, seed=1).abs()
    moved[[3, 7]] = -torch.inf
    grid = [Tile(1, 2, 3, row_separators=1)]
    assert zoo(x, moved, keep=6, grid=grid) == [0, 1, 2, 4, 5, 6]
