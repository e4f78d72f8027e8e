"""What a reducer assigns is merged: survivors carry the mean, or the weighted sum, of the states assigned to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze.reducers.base import Place, Reducer, Reduction, VisualTokens
from mllm_squeeze.registry import register_reducer, unregister_reducer


class PairMerge(Reducer):
    """Merge every odd token of a span into the even one before it."""

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    weighted: bool = False

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the even tokens."""
        number = torch.arange(tokens.mask.shape[1]).expand_as(tokens.mask)
        keep = tokens.mask & (number % 2 == 0)
        assign = torch.where(tokens.mask, number - number % 2, -1)
        weights = torch.where(number % 2 == 0, 0.75, 0.5) if self.weighted else None
        return Reduction(keep, assign, weights)


@pytest.fixture(autouse=True)
def reducer() -> Iterator[None]:
    """Register the reducer for a test."""
    register_reducer("pair_merge", PairMerge)
    yield
    unregister_reducer("pair_merge")


def recipe(at: Any, weighted: bool) -> dict[str, Any]:
    """Return one merging cut of half of the tokens."""
    steps = [{"reducer": "pair_merge", "at": at, "ratio": 0.5, "weighted": weighted}]
    return {"method": "pairs", "steps": steps}


def merged_pairs(states: Tensor, span: Any, weighted: bool) -> Tensor:
    """Return the merged states (K, D) of a span from its dense states at the cut."""
    mine = states[span.sample, list(span.columns)]
    out = []
    for first in range(0, span.length, 2):
        pair = mine[first : first + 2]
        weight = torch.tensor([0.75, 0.5])[: len(pair), None]
        out.append((pair * weight).sum(0) if weighted else pair.mean(0))
    return torch.stack(out)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("batched", ["single", "left", "right"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_survivors_carry_what_was_assigned(family: str, batched: str, layer: int, weighted: bool) -> None:
    t = tiny.load(family)
    inputs = t.inputs["two_images"] if batched == "single" else t.batch(side=batched).inputs
    forced = oracle.forced_tokens(inputs["input_ids"].shape[0], 4)
    at: Any = {"layer": layer} if layer else "projector"
    with oracle.capture(t.model, [layer]) as dense:
        oracle.run(t.model, inputs, forced[:, :0])
    with squeeze.applied(t.model, recipe(at, weighted)) as handle:
        squeezed = oracle.run(t.model, inputs, forced)
        (cut,), spans = handle.cuts, handle.layout.spans
    # The rows that the oracle writes at the cut, worked out from the dense states alone.
    width = max(len(k) for k in cut.kept)
    compact = torch.zeros(len(cut.kept), width, dense[layer].shape[-1])
    for b, kept in enumerate(cut.kept):
        compact[b, : len(kept)] = dense[layer][b, kept]
    for span in spans:
        place = torch.isin(cut.kept[span.sample], torch.tensor(span.columns)).nonzero().flatten()
        assert cut.kept[span.sample][place].tolist() == list(span.columns)[::2]
        compact[span.sample, place] = merged_pairs(dense[layer], span, weighted)
    expected = oracle.masked_logits(t.model, inputs, [cut], forced, {layer: compact})
    oracle.assert_steps(squeezed, expected, inputs, [cut], "merged")
    unmerged = oracle.masked_logits(t.model, inputs, [cut], forced)
    assert oracle.gap(unmerged.decode, squeezed.decode) > 20 * oracle.TOLERANCE


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl", "qwen3_vl"])
def test_average_pooling_of_a_picture(family: str) -> None:
    """2 x 2 windows of a grid of 4 x 4, written out."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    with oracle.capture(t.model, [0]) as dense:
        oracle.run(t.model, inputs, forced)
    with matrix.applied(t.model, "avgpool", ratio=0.75) as handle:
        with oracle.capture(t.model, [0]) as states:
            oracle.run(t.model, inputs, forced)
        (cut,), (span,) = handle.cuts, handle.layout.spans
    grid = dense[0][0, list(span.columns)].view(2, 2, 2, 2, -1)
    expected = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).mean(2).flatten(0, 1)
    place = torch.isin(cut.kept[0], torch.tensor(span.columns)).nonzero().flatten()
    oracle.assert_close(states[0][0, place], expected, "pooled", 1e-6)
