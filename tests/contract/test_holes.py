"""Holes in the attention mask: masked tokens are no candidates, stay masked, and cost nobody else a place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import matrix
import oracle
import tiny
from mllm_squeeze import ops

STEPS = 3
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")


def with_holes(t: tiny.TinyModel, inputs: tiny.Inputs, seed: int, share: float = 0.2) -> tiny.Inputs:
    """Return the inputs with a random share of all real tokens masked, visual ones and words alike."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).clone()
    holes = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < share
    # The last token is the one that answers.
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    holes[torch.arange(len(mask)), last] = False
    return {**inputs, "attention_mask": mask.masked_fill(holes, 0)}


def fix_positions(t: tiny.TinyModel, inputs: tiny.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give M-RoPE models the positions of the prompt without holes: they cannot make them for half a picture."""
    if not hasattr(t.model.model, "get_rope_index"):
        return
    original = oracle.positions
    monkeypatch.setattr(oracle, "positions", lambda model, _, steps: original(model, inputs, steps))


def leading(states: Tensor, kept: list[Tensor]) -> Tensor:
    """Return states (B, M, D) behind a cut, whose shorter rows are padded in front, with the padding behind."""
    return torch.stack([row.roll(len(mine), 0) for row, mine in zip(states, kept, strict=True)])


def prove(t: tiny.TinyModel, method: str, inputs: tiny.Inputs, **changes: object) -> list[Tensor]:
    """Compare a squeezed run with the masked dense one; returns what the last cut keeps."""
    forced = oracle.forced_tokens(len(inputs["input_ids"]), STEPS)
    with matrix.applied(t.model, method, **changes) as handle:
        with oracle.capture(t.model, range(4)) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
        spans = handle.layout.spans
    real = inputs["attention_mask"].bool()
    for cut in cuts:
        for b, kept in enumerate(cut.kept):
            assert bool(real[b, kept].all()), "a masked token was kept"
            words = (real & ~t.visual(inputs))[b].nonzero().flatten()
            assert bool(torch.isin(words, kept).all()), "a word was dropped"
    for span in spans:
        assert bool(real[span.sample, list(span.columns)].all())
    merged = {c.layer: leading(states[c.layer], c.kept) for c in cuts} if matrix.METHODS[method].merges else None
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, merged, repack)
    oracle.assert_steps(squeezed, expected, inputs, cuts, method)
    assert cuts, "nothing was cut"
    return cuts[-1].kept


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [*matrix.CORE, "visionzip", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_with_holes_equals_masking(family: str, method: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tiny.load(family)
    batch = t.batch(side=side).inputs
    fix_positions(t, batch, monkeypatch)
    for seed in range(2):
        inputs = with_holes(t, batch, seed)
        kept = prove(t, method, inputs)
        there, visual = inputs["attention_mask"].bool(), t.visual(inputs)
        for b, row in enumerate(kept):
            if method in ("divprune", "fastv", "random") and b == 0:
                # One picture; the budget counts the tokens that are there.
                assert int(visual[b, row].sum()) == ops.kept_count(int((there & visual)[b].sum()), 0.5)
