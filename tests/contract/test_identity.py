"""ratio=0 changes no bit: forward, decode and generate, with everything hooked."""

from __future__ import annotations

import pytest
import torch

import matrix
import oracle
import tiny

CELLS = matrix.cells() + matrix.cells(families=matrix.REPRESENTATIVE, implementations=("eager",))


@pytest.mark.parametrize(("family", "method", "kind", "implementation"), CELLS)
def test_ratio_zero_is_bit_equal(family: str, method: str, kind: str, implementation: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, 3)
    with matrix.attention(t.model, implementation):
        steps = oracle.run(t.model, inputs, forced)
        generated = oracle.generate(t.model, inputs, forced)
        with matrix.applied(t.model, method, **matrix.method(method).nothing):
            squeezed = oracle.run(t.model, inputs, forced)
            assert torch.equal(squeezed.prefill, steps.prefill)
            assert torch.equal(squeezed.decode, steps.decode)
            assert torch.equal(oracle.generate(t.model, inputs, forced), generated)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_ratio_zero_is_bit_equal_in_a_padded_batch(family: str, side: str) -> None:
    t = tiny.load(family)
    batch, forced = t.batch(side=side), oracle.forced_tokens(3, 3)
    steps = oracle.run(t.model, batch.inputs, forced)
    with matrix.applied(t.model, "fastv", ratio=0):
        squeezed = oracle.run(t.model, batch.inputs, forced)
    assert torch.equal(squeezed.prefill, steps.prefill)
    assert torch.equal(squeezed.decode, steps.decode)


@pytest.mark.parametrize("method", matrix.CORE)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_prompt_without_pictures_is_bit_equal(family: str, method: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["text"], oracle.forced_tokens(1, 3)
    steps = oracle.run(t.model, inputs, forced)
    with matrix.applied(t.model, method), pytest.warns(UserWarning, match="(?i)no (image|visual)"):
        squeezed = oracle.run(t.model, inputs, forced)
    assert torch.equal(squeezed.prefill, steps.prefill)
    assert torch.equal(squeezed.decode, steps.decode)
