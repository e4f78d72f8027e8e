"""remove() puts everything back, also after an exception, and other models never notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny


class PlannedError(Exception):
    """Raised by a test inside a forward."""


def fail(*_: Any) -> None:
    """Raise, as a hook."""
    raise PlannedError


def breaking(module: Any, call: Callable[[], Any]) -> None:
    """Run `call` while a hook of the user raises in the middle of it."""
    handle = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(PlannedError):
            call()
    finally:
        handle.remove()


@pytest.mark.parametrize(("family", "method", "kind", "implementation"), matrix.cells())
def test_everything_is_put_back(family: str, method: str, kind: str, implementation: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, 2)
    with matrix.attention(t.model, implementation):
        dense = oracle.run(t.model, inputs, forced)
        before = snapshot.snapshot(t.model)
        handle = squeeze.apply(t.model, method, **matrix.method(method).params)
        oracle.run(t.model, inputs, forced)
        oracle.generate(t.model, inputs, forced)
        handle.remove()
        snapshot.assert_same(before, snapshot.snapshot(t.model))
        again = oracle.run(t.model, inputs, forced)
    assert torch.equal(dense.prefill, again.prefill)
    assert torch.equal(dense.decode, again.decode)


@pytest.mark.parametrize("where", ["tower", "first layer", "middle layer", "last layer", "attention", "head"])
@pytest.mark.parametrize("method", matrix.EVERYWHERE)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_put_back_after_an_exception(family: str, method: str, where: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    layers = oracle.text_model(t.model).layers
    modules = {"tower": t.model.get_submodule(t.family.tower), "first layer": layers[0], "middle layer": layers[2]}
    modules |= {"last layer": layers[3], "attention": layers[1].self_attn, "head": t.model.get_output_embeddings()}
    dense = oracle.run(t.model, inputs, forced)
    before = snapshot.snapshot(t.model)
    with matrix.applied(t.model, method):
        good = oracle.run(t.model, inputs, forced)
        breaking(modules[where], lambda: t.model(**inputs))
        breaking(modules[where], lambda: oracle.generate(t.model, inputs, forced))
        # A failed call leaves nothing behind that the next one would read.
        after = oracle.run(t.model, inputs, forced)
        assert torch.equal(good.prefill, after.prefill)
        assert torch.equal(good.decode, after.decode)
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    assert torch.equal(oracle.run(t.model, inputs, forced).prefill, dense.prefill)


@pytest.mark.quick
def test_put_back_when_the_block_raises() -> None:
    t = tiny.load("llava")
    before = snapshot.snapshot(t.model)
    with pytest.raises(PlannedError), squeeze.applied(t.model, "fastv", ratio=0.5, layer=2):
        raise PlannedError
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_failed_apply_changes_nothing(family: str) -> None:
    t = tiny.load(family)
    before = snapshot.snapshot(t.model)
    with pytest.raises(squeeze.SqueezeError):
        squeeze.apply(t.model, "fastv", ratio=0.5, layer=99)
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("method", matrix.CORE)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_another_instance_is_untouched(family: str, method: str) -> None:
    t, other = tiny.load(family), tiny.fresh(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    dense = oracle.run(other.model, inputs, forced)
    before = snapshot.snapshot(other.model)
    with matrix.applied(t.model, method):
        during = oracle.run(other.model, inputs, forced)
        after = snapshot.snapshot(other.model)
        # The tap stands in transformers' table while a handle is alive; nothing else may differ.
        lines = [line for line in snapshot.differences(before, after) if not line.startswith("tables.attention table")]
        assert not lines
        squeezed = oracle.run(t.model, inputs, forced)
    assert torch.equal(dense.prefill, during.prefill)
    assert torch.equal(dense.decode, during.decode)
    assert not torch.equal(dense.prefill, squeezed.prefill)


@pytest.mark.quick
def test_two_models_squeezed_at_once() -> None:
    """Removing one handle leaves the other one working."""
    one, two = tiny.load("llava"), tiny.fresh("llava")
    inputs, forced = one.inputs["image"], oracle.forced_tokens(1, 3)
    with matrix.applied(two.model, "fastv"):
        with matrix.applied(one.model, "sparsevlm"):
            both = oracle.run(two.model, inputs, forced)
        alone = oracle.run(two.model, inputs, forced)
    assert torch.equal(both.prefill, alone.prefill)
    assert torch.equal(both.decode, alone.decode)


def test_remove_keeps_hooks_of_others() -> None:
    """Hooks that a user registered before or after apply() are still there after remove()."""
    t = tiny.load("llava")
    seen: list[str] = []
    layer = oracle.text_model(t.model).layers[2]
    first = layer.register_forward_pre_hook(lambda *_: seen.append("first"))
    handle = squeeze.apply(t.model, "fastv", ratio=0.5, layer=2)
    second = layer.register_forward_hook(lambda *_: seen.append("second"))
    handle.remove()
    try:
        with torch.no_grad():
            t.model(**t.inputs["image"])
    finally:
        first.remove()
        second.remove()
    assert seen == ["first", "second"]
