"""Methods that look at several halves of a layer: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.build import visual_tokens

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.parts.score.transport import Transport
from mllm_squeeze.reducers.needs import Features, States


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# TopV


def topv(x: torch.Tensor, y: torch.Tensor, grid: Any, **params: Any) -> Any:
    return squeeze.choose("topv", signals={States("in"): x, States("mlp_in"): y}, grid=grid, **params)


def test_one_round_of_transport_by_hand():
    """u = [.3333, 1], v = [.8571, 1.2]; ended on the rows both sums would be .5."""
    kernel = torch.tensor([[[1, 0.5], [0.25, 0.25]]])
    half, both = torch.full((1, 2), 0.5), torch.ones(1, 2, dtype=torch.bool)
    mass = ops.transported_mass(kernel.log(), half, half, both, 1)
    assert mass[0].tolist() == pytest.approx([0.4857, 0.5143], abs=1e-4)


def test_every_third_of_the_dropped_comes_back():
    """Kept are 1 and 4; of 0, 2, 3, 5, 6, 7 the first and the fourth come back."""
    recipe = {
        "method": "back",
        "params": {"ratio": 0.5},
        "steps": [
            {
                "at": "projector",
                "ratio": "${ratio}",
                "score": "norm",
                "select": {"in_turn": [{"select": "top_k", "share": 0.5}, {"select": "stride"}]},
            }
        ],
    }
    features = torch.tensor([0.0, 5, 1, 2, 6, 1, 2, 3])[:, None]
    assert squeeze.choose(recipe, features=features).kept.tolist() == [0, 1, 4, 5]


def test_by_default_every_fourth_of_the_dropped_comes_back():
    x, y = noise(48, 5), noise(48, 5, seed=1)
    kept = topv(x, y, (6, 8)).kept.tolist()
    mass = transport_by_loops(x, y, (6, 8), "norm")
    best = torch.tensor(mass).argsort(descending=True, stable=True)[:16].tolist()
    dropped = [n for n in range(48) if n not in best]
    assert kept == sorted(best + dropped[::4])


def transport_by_loops(x, y, shape, marginals, rounds=3, sigma=10.0, entropy=0.1) -> list[float]:
    """The mass that leaves each token of one picture, in float64."""
    x, y = x.double(), y.double()
    cells = [(h, w) for h in range(shape[0]) for w in range(shape[1])]
    middle = [(side - 1) / 2 for side in shape]
    number = len(cells)
    costs = [
        [[float((x[i] - y[j]).norm()) for j in range(number)] for i in range(number)],
        [[1 - math.exp(-(math.dist(a, b) ** 2) / (2 * sigma**2)) for b in cells] for a in cells],
        [[math.dist(a, middle)] * number for a in cells],
    ]
    total = torch.zeros(number, number, dtype=torch.float64)
    for weight, cost in zip((1, 1, 0.01), costs, strict=True):
        cost = torch.tensor(cost, dtype=torch.float64)
        if cost.max() > cost.min():
            total += weight * (cost - cost.min()) / (cost.max() - cost.min())
    kernel = torch.exp(-total / entropy)
    p, q = (one.norm(dim=1) if marginals == "norm" else torch.ones(number).double() for one in (x, y))
    p, q, v = p / p.sum(), q / q.sum(), torch.ones(number).double()
    for _ in range(rounds):
        u = p / (kernel @ v)
        v = q / (kernel.T @ u)
    return [number * float(u[i] * (kernel[i] * v).sum()) for i in range(number)]


def masses(part: Transport, x, y, tiles, width=None) -> torch.Tensor:
    tokens = visual_tokens(x, [1] * len(x), tiles=tiles, signals={States("in"): x, States("mlp_in"): y}, width=width)
    return part.score(tokens, Groups(tokens.origin.masked_fill(~tokens.mask, -1).clamp(max=0), 1))


@pytest.mark.parametrize("marginals", ["norm", "even"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 6)])
def test_transport_is_its_loops(shape, marginals):
    number = shape[0] * shape[1]
    x, y = noise(number, 5), noise(number, 5, seed=1)
    found = masses(Transport(marginals=marginals), [x], [y], [(Tile(1, *shape),)])[0]
    assert found.tolist() == pytest.approx(transport_by_loops(x, y, shape, marginals), rel=1e-4)
    assert number == 1 or float(found.std()) > 1e-3, "marginals that are met say nothing"


def test_the_output_of_the_block_may_be_the_target():
    x, y = noise(12, 5), noise(12, 5, seed=1)
    signals = {States("in"): x, Features(): y}
    other = squeeze.choose("topv", signals=signals, grid=(3, 4), target="out")
    assert other.kept.tolist() == topv(x, y, (3, 4)).kept.tolist()


def test_each_crop_and_frame_is_a_transport_of_its_own():
    x, y = noise(28, 5), noise(28, 5, seed=1)
    tiles = (Tile(1, 3, 4), Tile(1, 3, 4, row_separators=1, tail=1))
    found = masses(Transport(), [x], [y], [tiles])[0]
    cells = [12 + n for row in range(3) for n in range(5 * row, 5 * row + 4)]
    assert found[:12].tolist() == pytest.approx(transport_by_loops(x[:12], y[:12], (3, 4), "norm"), rel=1e-4)
    assert found[cells].tolist() == pytest.approx(transport_by_loops(x[cells], y[cells], (3, 4), "norm"), rel=1e-4)
    others = [n for n in range(12, 28) if n not in cells]
    assert bool((found[others] == -torch.inf).all())
    video = masses(Transport(), [x[:24]], [y[:24]], [(Tile(2, 3, 4),)])[0]
    assert video[12:].tolist() == pytest.approx(transport_by_loops(x[12:24], y[12:24], (3, 4), "norm"), rel=1e-4)


def test_packed_crops_are_transports_of_their_own():
    x, y = noise(36, 5), noise(36, 5, seed=1)
    found = masses(Transport(), [x], [y], [(Tile(1, 3, 4), Tile(1, 6, 4))])[0]
    for crop in (slice(0, 12), slice(12, 24), slice(24, 36)):
        assert found[crop].tolist() == pytest.approx(transport_by_loops(x[crop], y[crop], (3, 4), "norm"), rel=1e-4)


def test_a_padded_batch_of_transports_is_its_singles():
    tiles = [(Tile(1, 4, 6),), (Tile(1, 3, 2), Tile(1, 3, 2)), (Tile(3, 2, 2),)]
    x = [noise(sum(tile.length for tile in one), 5, seed=n) for n, one in enumerate(tiles)]
    y = [noise(len(one), 5, seed=n + 9) for n, one in enumerate(x)]
    both = masses(Transport(), x, y, tiles, width=30)
    for row, one in enumerate(x):
        single = masses(Transport(), [one], [y[row]], [tiles[row]])[0]
        assert torch.allclose(both[row, : len(one)], single, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 23, 24])
def test_topv_keeps_its_budget(count):
    assert len(topv(noise(24, 5), noise(24, 5, seed=1), (4, 6), keep=count).kept) == count
    assert len(topv(noise(24, 5), noise(24, 5, seed=1), (4, 6), ratio=0).kept) == 24


def test_states_that_are_all_alike_are_transported_evenly():
    x = torch.zeros(9, 5)
    assert bool(masses(Transport(), [x], [x], [(Tile(1, 3, 3),)]).isfinite().all())


def test_transport_asks_for_the_grid():
    with pytest.raises(UnsupportedInputError, match="grid of this picture is not known"):
        topv(noise(12, 5), noise(12, 5, seed=1), None)
