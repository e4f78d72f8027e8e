"""Budgets at the edge: one token, nearly all tokens, a span smaller than the budget beside a larger one."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import matrix
import oracle
import tiny
import ways
from mllm_squeeze.errors import ConfigError

BUDGETS: tuple[dict[str, Any], ...] = ({"keep": 1}, {"keep": 3}, {"ratio": 0.97}, {"ratio": 0.06})


@functools.cache
def spans_of(family: str, kind: str) -> tuple[Any, ...]:
    """Return the spans of a prompt, as a method that takes any of them sees them."""
    t = tiny.load(family)
    with matrix.applied(t.model, matrix.CORE[0]) as handle:
        oracle.run(t.model, t.inputs[kind], oracle.forced_tokens(1, 0))
        return tuple(handle.layout.spans)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("family", "method", "kind", "implementation"),
    matrix.cells(families=("llava", "llava_next", "llava_onevision", "qwen3_vl")),
)
def test_any_budget(family: str, method: str, kind: str, implementation: str, budget: dict[str, Any]) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, 3)
    m = matrix.method(method)
    if any(ways.refuses(m, span, **budget) for span in spans_of(family, kind) if span.modality in m.modalities):
        # A rule that keeps whole frames, for one, cannot leave as few as is asked: it says what it can.
        with pytest.raises(ConfigError, match="at least|at most|less than"), matrix.applied(t.model, method, **budget):
            oracle.run(t.model, inputs, forced)
        return
    with matrix.applied(t.model, method, **budget) as handle:
        with oracle.capture(t.model, range(4)) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
    visual = t.visual(inputs)[0]
    if "keep" in budget and m.exact:
        assert int(visual[cuts[-1].kept[0]].sum()) == budget["keep"] * len(handle.layout.spans)
    assert all(int(visual[c.kept[0]].sum()) >= 1 for c in cuts)
    merged = matrix.merged(method, cuts, states)
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, merged, repack)
    if matrix.method(method).decodes:
        expected.decode = squeezed.decode[:, :0]
    oracle.assert_steps(squeezed, expected, inputs, cuts, method)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [name for name in matrix.EVERYWHERE if matrix.method(name).exact])
@pytest.mark.parametrize("family", ["llava_next", "internvl", "qwen2_vl"])
def test_a_span_smaller_than_the_budget(family: str, method: str) -> None:
    """The smaller picture is kept whole, the larger one is cut to the budget."""
    t = tiny.load(family)
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, 3)
    with matrix.applied(t.model, method, keep=1) as handle:
        oracle.run(t.model, inputs, forced)
        small, large = sorted(handle.layout.spans, key=lambda span: span.length)
    budget = small.length + 4
    assert budget < large.length
    with matrix.applied(t.model, method, keep=budget) as handle:
        with oracle.capture(t.model, range(4)) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
    kept = set(cuts[-1].kept[0].tolist())
    assert len(kept & set(small.columns)) == small.length
    assert len(kept & set(large.columns)) == budget
    merged = matrix.merged(method, cuts, states)
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, merged, repack)
    oracle.assert_steps(squeezed, expected, inputs, cuts, method)
