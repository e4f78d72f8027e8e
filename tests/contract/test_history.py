"""What cuts of one rule left by now is told to those behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

import mllm_squeeze as squeeze
import tiny
from mllm_squeeze.reducers.base import Place, Reducer, Reduction, VisualTokens
from mllm_squeeze.registry import register_reducer, unregister_reducer


class Teller(Reducer):
    """Keep the first tokens, and tell a test what was said of earlier cuts."""

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    told: ClassVar[list[tuple[tuple[int, ...], ...]]] = []
    depths: ClassVar[set[int]] = set()

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep the first tokens."""
        self.told.append(tokens.history)
        self.depths.add(tokens.depth)
        return Reduction(tokens.mask & (torch.arange(tokens.mask.shape[1]) < tokens.budget[:, None]))


@pytest.fixture(autouse=True)
def teller() -> Iterator[None]:
    """Register the reducer for a test."""
    register_reducer("teller", Teller)
    Teller.told.clear()
    Teller.depths.clear()
    yield
    unregister_reducer("teller")


@pytest.mark.parametrize("prompt", ["image", "two_images"])
def test_each_cut_knows_what_those_before_it_left(prompt: str) -> None:
    t = tiny.load("llava")
    steps = [
        {"at": "projector", "keep": 20, "score": "norm"},
        {"reducer": "teller", "at": {"layer": 1}, "keep": 12},
        {"reducer": "teller", "at": {"layer": 2}, "keep": 7},
        {"reducer": "teller", "at": {"layer": 3}, "keep": 3},
    ]
    with squeeze.applied(t.model, {"method": "telling", "steps": steps}), torch.no_grad():
        for _ in range(2):  # one pass knows nothing of another
            Teller.told.clear()
            t.model(**t.inputs[prompt])
            spans = len(Teller.told[0])
            assert Teller.told == [((),) * spans, ((20, 12),) * spans, ((20, 12, 7),) * spans]
    assert Teller.depths == {t.model.config.get_text_config().num_hidden_layers}
