"""positions: repack means consecutive positions; the proof is the plain text model fed the shortened embeddings."""

from __future__ import annotations

from typing import Any

import pytest

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny

STEPS = 8
ONE_AXIS = [f for f in matrix.FAMILIES if not f.startswith("qwen")]

# Ways that act before the LLM alone: what they leave is a prompt of its own.
BEFORE = [
    name
    for name in matrix.WAYS
    if matrix.method(name).way.repacks and set(matrix.method(name).way.places) <= {"before", "encoder"}
]
REPACKED = matrix.cells(BEFORE, ONE_AXIS)


def recipe(positions: str, *layers: int) -> dict[str, Any]:
    """Return uniform cuts at these layers."""
    at: Any = "projector" if layers == (0,) else {"layers": list(layers)}
    steps = [{"select": "even_sample", "at": at, "ratio": 0.75}]
    return {"method": "mine", "positions": positions, "steps": steps}


@pytest.mark.parametrize("kind", ["image", "two_images"])
@pytest.mark.parametrize("family", ONE_AXIS)
def test_before_the_llm_it_is_the_plain_text_model(family: str, kind: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, STEPS)
    with squeeze.applied(t.model, recipe("repack", 0)) as handle:
        with oracle.capture(t.model, [0]) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        generated = oracle.generate(t.model, inputs, forced)
        kept = handle.cuts[0].kept[0]
    assert states[0].shape[1] == len(kept)
    plain = oracle.plain_logits(t.model, states[0], forced)
    oracle.assert_close(squeezed.prefill[:, kept], plain.prefill, "prefill")
    oracle.assert_close(squeezed.decode, plain.decode, "decode")
    oracle.assert_close(generated[:, 1:], plain.decode, "generate")


@pytest.mark.parametrize(("family", "method", "kind", "implementation"), REPACKED)
def test_methods_whose_papers_repack(family: str, method: str, kind: str, implementation: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, STEPS)
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method) as handle:
        assert handle.recipe.positions == "repack"
        with oracle.capture(t.model, [0]) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        kept = handle.cuts[0].kept[0]
    plain = oracle.plain_logits(t.model, states[0], forced)
    oracle.assert_close(squeezed.prefill[:, kept], plain.prefill, "prefill")
    oracle.assert_close(squeezed.decode, plain.decode, "decode")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2, 3)])
@pytest.mark.parametrize("family", ONE_AXIS)
def test_inside_the_llm(family: str, layers: tuple[int, ...], implementation: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, STEPS)
    with matrix.attention(t.model, implementation):
        with squeeze.applied(t.model, recipe("repack", *layers)) as handle:
            squeezed = oracle.run(t.model, inputs, forced)
            cuts = handle.cuts
        expected = oracle.masked_logits(t.model, inputs, cuts, forced, repack=True)
        oracle.assert_steps(squeezed, expected, inputs, cuts, "repack")
        kept = oracle.masked_logits(t.model, inputs, cuts, forced)
    assert oracle.gap(kept.decode, expected.decode) > 20 * oracle.TOLERANCE, "repack and keep cannot be told apart here"


@pytest.mark.parametrize("family", [f for f in matrix.FAMILIES if f.startswith("qwen")])
@pytest.mark.parametrize("layers", [(0,), (1, 2, 3)])
def test_three_axes_always_keep(family: str, layers: tuple[int, ...]) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, STEPS)
    with squeeze.applied(t.model, recipe("repack", *layers)) as handle:
        squeezed = oracle.run(t.model, inputs, forced)
        cuts = handle.cuts
    oracle.assert_steps(squeezed, oracle.masked_logits(t.model, inputs, cuts, forced), inputs, cuts, "keep")
