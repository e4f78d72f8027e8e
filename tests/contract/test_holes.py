"""Holes in the attention mask: masked tokens are no candidates, stay masked, and cost nobody else a place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cache_role
import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze import ops
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError

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
    merged = {c.layer: oracle.leading(states[c.layer], c.kept) for c in cuts} if matrix.method(method).merges else None
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, merged, repack)
    oracle.assert_steps(squeezed, expected, inputs, cuts, method)
    assert cuts, "nothing was cut"
    return cuts[-1].kept


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [*matrix.EVERYWHERE, matrix.KEEPS_POSITIONS])
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


@pytest.mark.parametrize("method", [*matrix.CORE, "avgpool"])
@pytest.mark.parametrize("family", ["gemma3", "internvl", "paligemma"])
def test_other_kinds_of_masks(family: str, method: str) -> None:
    """Sliding windows, pictures that look both ways, eager masks."""
    t = tiny.load(family)
    inputs = with_holes(t, t.batch(("image", "two_images", "text")).inputs, 5)
    with matrix.attention(t.model, "eager"):
        prove(t, method, inputs)


@pytest.mark.parametrize("left", [1, 5])
@pytest.mark.parametrize("method", matrix.EVERYWHERE)
def test_most_of_a_picture_is_masked(method: str, left: int) -> None:
    t = tiny.load("llava")
    inputs = {k: v.clone() for k, v in t.batch(("image", "two_images")).inputs.items()}
    mine = t.visual(inputs)[0].nonzero().flatten()
    inputs["attention_mask"][0, mine[: len(mine) - left]] = 0
    kept = prove(t, method, inputs)
    budget = ops.kept_count(left, matrix.method(method).params["ratio"])
    assert int(t.visual(inputs)[0, kept[0]].sum()) == budget


@pytest.mark.parametrize("method", [*matrix.CORE, "visionzip", "tome"])
def test_a_picture_that_is_masked_whole(method: str) -> None:
    """There is nothing to cut of it; the other picture is cut as it is."""
    t = tiny.load("llava")
    inputs = {k: v.clone() for k, v in t.batch(("two_images", "image")).inputs.items()}
    mine = t.visual(inputs)[0].nonzero().flatten()
    inputs["attention_mask"][0, mine[: len(mine) // 2]] = 0
    if method != "tome":
        prove(t, method, inputs)
    with matrix.applied(t.model, method) as handle, torch.no_grad():
        t.model(**inputs)
        assert [(span.sample, span.item) for span in handle.layout.spans] == [(0, 1), (1, 2)]
        inputs["attention_mask"][t.visual(inputs)] = 0
        with pytest.warns(SqueezeWarning, match="hides all visual tokens"):
            out = t.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    oracle.assert_close(out[real], t.model(**inputs).logits.detach()[real], "nothing was cut", 0.0)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_merged_in_the_encoder(family: str) -> None:
    """Of each merged group the first token that is there stays, so no group is lost to a hole."""
    t = tiny.load(family)
    inputs = t.inputs["image"]
    with matrix.applied(t.model, "tome") as handle:
        with oracle.capture(t.model, [0]) as whole:
            oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
        cut, (span,) = handle.cuts[0], handle.layout.spans
        # Mask the first token of some groups: their twins come up in the same order.
        hidden = {int(column) for column in cut.kept[0] if int(column) in span.columns}
        masked = with_holes(t, {k: v.clone() for k, v in inputs.items()}, 3)
        with oracle.capture(t.model, [0]) as short:
            squeezed = oracle.run(t.model, masked, oracle.forced_tokens(1, STEPS))
        cuts = handle.cuts
    real = masked["attention_mask"][0].bool()
    assert any(not real[column] for column in hidden), "no survivor was masked"
    assert bool(real[cuts[0].kept[0]].all())
    visual = t.visual(inputs)[0]
    mine = {tuple(row.tolist()) for row in short[0][0, visual[cuts[0].kept[0]]]}
    with matrix.applied(t.model, "tome", ratio=0.5) as handle:
        features = t.model.model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs}
        ).pooler_output
    every = torch.cat([item.reshape(-1, item.shape[-1]) for item in features])
    there = {tuple(row.tolist()) for row in every[real[visual]]}
    assert mine == there, "a group that is there was lost"
    assert len(whole[0][0]) >= len(short[0][0])
    expected = oracle.masked_logits(t.model, masked, cuts, oracle.forced_tokens(1, STEPS), {0: short[0]}, True)
    oracle.assert_steps(squeezed, expected, masked, cuts, "tome")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", matrix.CORE)
def test_generate_with_holes(method: str, cache: str) -> None:
    """What generate answers is what a forward with the same mask does."""
    t = tiny.load("llava")
    forced = oracle.forced_tokens(3, STEPS)
    inputs = with_holes(t, t.batch().inputs, 4)
    with matrix.applied(t.model, method):
        steps = oracle.run(t.model, inputs, forced)
        answers = oracle.generate(t.model, inputs, forced, cache_implementation=cache)
    oracle.assert_close(answers[:, 1:], steps.decode, method)


def test_a_hole_ends_what_can_be_cropped() -> None:
    """Entries behind the last hole are consecutive tokens; in front of it tokens and entries no longer go together."""
    t = tiny.load("llava")
    inputs = {k: v.clone() for k, v in t.inputs["image"].items()}
    inputs["attention_mask"][0, -3] = 0
    with matrix.applied(t.model, "divprune"), torch.no_grad():
        cache = cache_role.of_output(t.model(**inputs, use_cache=True))
        seen = cache.get_seq_length()
        with pytest.raises(UnsupportedInputError, match="last uncut stretch holds 2"):
            cache.crop(-3)
        cache.crop(-2)
        assert cache.get_seq_length() == seen - 2


def test_a_hole_in_a_grid_is_no_grid() -> None:
    """Rules that need whole frames say so; those that do not go on without."""
    t = tiny.load("llava_onevision")
    inputs = {k: v.clone() for k, v in t.inputs["video"].items()}
    inputs["attention_mask"][0, t.visual(inputs)[0].nonzero()[3]] = 0
    with pytest.raises(UnsupportedInputError, match="whole frames"), matrix.applied(t.model, "dycoke"):
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
    for method in ("vidcom2", "uniform", "avgpool"):
        prove(t, method, inputs)
    with squeeze.applied(t.model, "random", ratio=0.0), torch.no_grad():
        squeezed = t.model(**inputs).logits
    oracle.assert_close(squeezed, t.model(**inputs).logits.detach(), "identity", 0.0)
