"""Methods that look at how blocks change a token: worked examples by hand, and literal slow versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.reducers.needs import Attention, States


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# TransPrune


def test_transition_by_hand():
    """Outputs (1, 0), (0, .5), (-1, 0) of (1, 0): lengths 1 .5 1, cosines 1 0 -1, softmax of 0 1 2 or of 0 1 0."""
    given = torch.tensor([[[1.0, 0.0]] * 3])
    added = torch.tensor([[[1.0, 0.0], [0.0, 0.5], [-1.0, 0.0]]])
    there = torch.ones(1, 3, dtype=torch.bool)
    signed, turned = (ops.transition(given, added, there, how)[0].tolist() for how in (True, False))
    assert signed == pytest.approx([0.0900, 0.1224, 0.6652], abs=1e-4)
    assert turned == pytest.approx([0.2119, 0.2881, 0.2119], abs=1e-4)
    padded = ops.transition(given, added, torch.tensor([[True, True, False]]), True)[0].tolist()
    assert padded == pytest.approx([0.2689, 0.3655, 0.0], abs=1e-4)


def transprune(given: Any, added: Any, seen: torch.Tensor, among: Any = 0, first: float = 0.5, **params: Any) -> Any:
    """Run the first cut on what one attention got and added, whose MLP adds nothing."""
    signals: dict[Any, Any] = {Attention("next", rows="text"): seen}
    for half in ("attention", "mlp"):
        signals[States(f"{half}_in", of="all")] = given
        signals[States(f"{half}_out", of="all")] = added if half == "attention" else torch.zeros_like(added)
    later = dict.fromkeys(("first", "second", "ratio"), first)
    return squeeze.choose("transprune", at="layer 0.21875", signals=signals, among=among, **later, **params)


def test_transprune_by_hand():
    """Changes .1026 .1394 .7580 and attention .1667 .5 .3333 are .2692 .6394 1.0913 together: 2 and 1 stay."""
    given = torch.tensor([[1.0, 0.0]] * 3)
    added = torch.tensor([[1.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    seen = torch.tensor([0.1, 0.3, 0.2])
    assert transprune(given, added, seen, first=1 / 3).kept.tolist() == [1, 2]
    assert transprune(given, added, seen, first=2 / 3).kept.tolist() == [2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", ["signed", "abs"])
def test_transprune_is_its_loop(seed, direction):
    given, added, seen = noise(30, 6, seed=seed), noise(30, 6, seed=seed + 9), noise(20, seed=seed + 20).abs()
    turns, lengths = [], []
    for u, w in zip(given, added, strict=True):
        cosine = float(torch.cosine_similarity(u, w, dim=0))
        turns.append(1 - (cosine if direction == "signed" else abs(cosine)))
        lengths.append(float(w.norm() / u.norm()))
    share = torch.tensor(turns).softmax(0)
    change = (torch.tensor(lengths) * share)[4:24]
    score = change / change.sum() + seen / seen.sum()
    best = score.argsort(descending=True)[:8].sort().values
    kept = transprune(given, added, seen, among=4, first=0.6, direction=direction).kept
    assert kept.tolist() == best.tolist()


def test_transprune_must_know_where_the_picture_stands():
    with pytest.raises(ConfigError, match="said to stand up to place 22"):
        transprune(noise(22, 6), noise(22, 6, seed=1), noise(20).abs(), among=3)
    with pytest.raises(ConfigError, match="say in among="):
        transprune(noise(22, 6), noise(22, 6, seed=1), noise(20).abs(), among={})
