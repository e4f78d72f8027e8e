"""The handle: disabled(), applied(), the cuts and the layout of the last prefill, the report."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

import cache_role
import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from mllm_squeeze.errors import NotAppliedError


@pytest.mark.parametrize("method", matrix.EVERYWHERE)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_disabled_is_the_dense_model(family: str, method: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    dense = oracle.run(t.model, inputs, forced)
    with matrix.applied(t.model, method) as handle:
        first = oracle.run(t.model, inputs, forced)
        with handle.disabled():
            off = oracle.run(t.model, inputs, forced)
            generated = oracle.generate(t.model, inputs, forced)
        second = oracle.run(t.model, inputs, forced)
    assert torch.equal(off.prefill, dense.prefill)
    assert torch.equal(off.decode, dense.decode)
    assert (
        torch.equal(generated[:, 0], dense.prefill[:, -1]) or oracle.gap(generated[:, 0], dense.prefill[:, -1]) < 1e-5
    )
    assert torch.equal(first.prefill, second.prefill)
    assert not torch.equal(first.prefill, dense.prefill)


@pytest.mark.quick
def test_disabled_ends_after_an_exception() -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 1)
    with matrix.applied(t.model, "fastv") as handle:
        first = oracle.run(t.model, inputs, forced)
        with pytest.raises(ZeroDivisionError), handle.disabled():
            _ = 1 / 0
        assert torch.equal(first.prefill, oracle.run(t.model, inputs, forced).prefill)


@pytest.mark.quick
def test_a_squeezed_cache_decodes_on_while_disabled() -> None:
    """What decode needs lives with the cache, so a prompt that was cut stays right."""
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    for method in ("fastv", "random", "divprune", "pyramiddrop"):
        for implementation in matrix.IMPLEMENTATIONS:
            with matrix.attention(t.model, implementation), matrix.applied(t.model, method) as handle, torch.no_grad():
                expected = oracle.run(t.model, inputs, forced)
                out = t.model(**inputs, use_cache=True)
                with handle.disabled():
                    out = t.model(input_ids=forced[:, :1], **cache_role.behind(out))
                oracle.assert_close(out.logits[:, -1], expected.decode[:, 0], f"{method} {implementation}")


@pytest.mark.quick
def test_what_a_handle_says() -> None:
    t = tiny.load("llava")
    with matrix.applied(t.model, "fastv") as handle:
        assert handle.method == "fastv"
        assert handle.model is t.model
        assert handle.recipe.params["ratio"] == 0.5
        assert handle.cuts == ()
        with pytest.raises(squeeze.SqueezeError, match="(?i)run"):
            handle.report()
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1))
        (cut,) = handle.cuts
        assert cut.layer == 2
        assert len(cut.kept) == 1
        assert cut.kept[0].dtype == torch.int64
        oracle.run(t.model, t.inputs["two_images"], oracle.forced_tokens(1, 1))
        assert len(handle.cuts[0].kept[0]) > len(cut.kept[0])


@pytest.mark.parametrize(
    ("family", "method", "kind", "implementation"), matrix.cells(families=(*matrix.REPRESENTATIVE, "internvl"))
)
def test_the_report_counts_what_the_cuts_say(family: str, method: str, kind: str, implementation: str) -> None:
    t = tiny.load(family)
    with matrix.applied(t.model, method) as handle:
        oracle.generate(t.model, t.inputs[kind], oracle.forced_tokens(1, 2))
        report, cuts = handle.report(), handle.cuts
    plain = report.as_dict()
    assert json.loads(report.to_json()) == json.loads(json.dumps(plain))
    text = str(report)
    assert method in text
    whole = int(t.visual(t.inputs[kind]).sum())
    kept = int(t.visual(t.inputs[kind])[0][cuts[-1].kept[0]].sum())
    assert str(whole) in text
    assert str(kept) in text


@pytest.mark.quick
def test_remove_by_the_model() -> None:
    t = tiny.load("llava")
    before = snapshot.snapshot(t.model)
    squeeze.apply(t.model, "divprune", ratio=0.5)
    squeeze.remove(t.model)
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    with pytest.raises(NotAppliedError, match="apply"):
        squeeze.remove(t.model)


@pytest.mark.quick
def test_remove_inside_the_block() -> None:
    t = tiny.load("llava")
    before = snapshot.snapshot(t.model)
    with squeeze.applied(t.model, "fastv", ratio=0.5, layer=2) as handle:
        handle.remove()
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.quick
def test_a_forgotten_handle_stays_applied() -> None:
    """The model keeps the method alive, not the variable that apply() was assigned to."""
    import gc

    t = tiny.fresh("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 1)
    squeeze.apply(t.model, "fastv", ratio=0.5, layer=2)
    gc.collect()
    squeezed = oracle.run(t.model, inputs, forced)
    squeeze.remove(t.model)
    assert not torch.equal(squeezed.prefill, oracle.run(t.model, inputs, forced).prefill)


@pytest.mark.quick
def test_a_model_with_a_handle_can_be_freed() -> None:
    import gc
    import weakref

    t = tiny.fresh("llava")
    handle = squeeze.apply(t.model, "fastv", ratio=0.5, layer=2)
    oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1))
    gone = weakref.ref(t.model)
    del t, handle
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_keep_says_the_same_as_ratio(family: str) -> None:
    """keep as a fraction, keep as a number of tokens per span, and ratio agree."""
    t = tiny.load(family)
    inputs = t.inputs["two_images"]
    spans = []
    for changes in ({"ratio": 0.75}, {"keep": 0.25}, {"keep": 6}):
        with matrix.applied(t.model, "divprune", **changes) as handle, torch.no_grad():
            t.model(**inputs)
            kept = set(handle.cuts[-1].kept[0].tolist())
            spans.append([len(kept & set(span.columns)) for span in handle.layout.spans])
    assert spans[0] == spans[1]
    assert spans[2] == [6, 6]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("then", ["nothing", "random", "divprune"])
@pytest.mark.parametrize("method", ["fastv", "random", "divprune", "pyramiddrop"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cut_cache_outlives_its_handle(family: str, method: str, then: str, implementation: str) -> None:
    """After remove(), or under another method, a cache that was cut decodes on right, or an error says why not."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 1)
    with matrix.attention(t.model, implementation), torch.no_grad():
        with matrix.applied(t.model, method):
            expected = oracle.run(t.model, inputs, forced)
            cache = cache_role.of_output(t.model(**inputs, use_cache=True))
        other = matrix.applied(t.model, then) if then != "nothing" else contextlib.nullcontext()
        with other:
            try:
                logits = t.model(input_ids=forced, **cache_role.given(cache)).logits
            except squeeze.SqueezeError as error:
                message = str(error)
            else:
                message = None
    if message is None:
        oracle.assert_close(logits[:, -1], expected.decode[:, 0], "decode")
    else:
        assert "cache" in message
