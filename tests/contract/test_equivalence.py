"""A cut equals masking: the dense model with the dropped columns closed answers the same, in prefill and decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
import ways

STEPS = 8


def squeeze_and_prove(t: tiny.TinyModel, inputs: tiny.Inputs, method: str, **changes: Any) -> Any:
    """Run squeezed and oracle, compare every logit that both have, and return the handle."""
    forced = oracle.forced_tokens(inputs["input_ids"].shape[0], STEPS)
    with matrix.applied(t.model, method, **changes) as handle:
        with oracle.capture(t.model, range(4)) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
    assert cuts, "nothing was cut"
    merged = matrix.merged(method, cuts, states)
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, merged, repack)
    if matrix.method(method).decodes:
        expected.decode = squeezed.decode[:, :0]
    oracle.assert_steps(squeezed, expected, inputs, cuts, method)
    return handle


def check_cuts(t: tiny.TinyModel, inputs: tiny.Inputs, handle: Any) -> None:
    """Text is never cut, padding never kept, columns ascend, and every cut is a subset of the one before."""
    visual = t.visual(inputs)
    for b in range(visual.shape[0]):
        before = set(inputs["attention_mask"][b].nonzero().flatten().tolist())
        text = before - set(visual[b].nonzero().flatten().tolist())
        for cut in handle.cuts:
            kept = cut.kept[b].tolist()
            assert kept == sorted(set(kept))
            assert set(kept) <= before
            assert text <= set(kept), f"text was cut at layer {cut.layer}"
            before = set(kept)


def check_counts(handle: Any, method: str, **changes: Any) -> None:
    """Each span is left with what the rule says of it, to the token; or nearly, where `ways.left_of` says why."""
    m, cuts = matrix.method(method), handle.cuts
    for span in handle.layout.spans:
        if span.modality not in m.modalities:
            continue
        kept = [len(set(cut.kept[span.sample].tolist()) & set(span.columns)) for cut in cuts]
        expected = ways.left_of(m, span, kept[-2] if len(kept) > 1 else None, **changes)
        if expected is not None:
            assert abs(kept[-1] - expected.tokens) <= expected.slack, f"{kept[-1]} tokens are left of a span"


@pytest.mark.parametrize(
    ("family", "method", "kind", "implementation"), matrix.cells(implementations=("sdpa", "eager"))
)
def test_cut_equals_mask(family: str, method: str, kind: str, implementation: str) -> None:
    t = tiny.load(family)
    inputs = t.inputs[kind]
    with matrix.attention(t.model, implementation):
        handle = squeeze_and_prove(t, inputs, method)
    check_cuts(t, inputs, handle)
    check_counts(handle, method)


@pytest.mark.parametrize(
    ("family", "method", "kind", "implementation"), matrix.cells(kinds=("two_images", "image_video"))
)
def test_several_pictures_in_one_prompt(family: str, method: str, kind: str, implementation: str) -> None:
    t = tiny.load(family)
    handle = squeeze_and_prove(t, t.inputs[kind], method)
    check_cuts(t, t.inputs[kind], handle)
    check_counts(handle, method)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("ratio", [0.25, 0.9])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_every_layer(family: str, ratio: float, layer: int) -> None:
    t = tiny.load(family)
    recipe = {
        "method": "uniform_at_a_layer",
        "params": {"ratio": ratio, "layer": layer},
        "steps": [{"select": "even_sample", "at": {"layer": "${layer}"}, "ratio": "${ratio}"}],
    }
    if layer == 0:
        recipe["steps"] = [{"select": "even_sample", "at": "projector", "ratio": "${ratio}"}]
        recipe["params"] = {"ratio": ratio}
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    with squeeze.applied(t.model, recipe) as handle:
        squeezed = oracle.run(t.model, inputs, forced)
    assert [c.layer for c in handle.cuts] == [layer]
    kept = int(t.visual(inputs)[0][handle.cuts[0].kept[0]].sum())
    assert kept == ways.kept_of(int(t.visual(inputs).sum()), 1 - ratio)
    expected = oracle.masked_logits(t.model, inputs, handle.cuts, forced)
    oracle.assert_steps(squeezed, expected, inputs, handle.cuts, f"layer {layer}")


@pytest.mark.parametrize("method", matrix.CORE)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_generate_sees_the_same_cut(family: str, method: str) -> None:
    """generate() encodes the picture before the prefill and makes its own positions."""
    t = tiny.load(family)
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, STEPS)
    with matrix.applied(t.model, method):
        steps = oracle.run(t.model, inputs, forced)
        generated = oracle.generate(t.model, inputs, forced)
    oracle.assert_close(generated[:, 0], steps.prefill[:, -1], "first token")
    oracle.assert_close(generated[:, 1:], steps.decode, "decode")


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_the_oracle_can_fail(family: str, kind: str) -> None:
    """A cut that differs in one column is told apart by far more than the tolerance."""
    if not matrix.has(family, kind):
        kind = "two_images"
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, 2)
    width = inputs["input_ids"].shape[1]
    columns = torch.arange(width)
    victim = int(t.visual(inputs)[0].nonzero()[3])
    for layer in range(4):
        cut = oracle.Drop(layer, [columns[columns != victim]])
        other = oracle.Drop(layer, [columns[columns != victim + 1]])
        a = oracle.masked_logits(t.model, inputs, [cut], forced)
        b = oracle.masked_logits(t.model, inputs, [other], forced)
        assert oracle.gap(a.prefill[:, -1], b.prefill[:, -1]) > 20 * oracle.TOLERANCE
        assert oracle.gap(a.decode, b.decode) > 20 * oracle.TOLERANCE
