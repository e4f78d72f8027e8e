"""FlashAttention by a stand-in on the CPU: masks are a 2-D key mask or None, causality counts from the bottom right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze.family.table import TABLE

METHODS = [matrix.KEEPS_POSITIONS, *matrix.EVERYWHERE]
STEPS = 5


def reference_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute what FlashAttention computes, and refuse what it cannot take.

    query: (B, H, Tq, d). key, value: (B, Hkv, Tk, d). attention_mask: (B, Tk), 0 or False for padded keys, or None.
    Query i sees keys up to i + Tk - Tq. Gaps in position_ids would be read as packed sequences, as transformers does.
    """
    queries, keys = query.shape[2], key.shape[2]
    assert attention_mask is None or attention_mask.ndim == 2, f"FlashAttention got a mask {attention_mask.shape}"
    assert attention_mask is None or attention_mask.shape == (query.shape[0], keys), "the mask does not fit the keys"
    positions = kwargs.get("position_ids")
    if attention_mask is None and positions is not None and queries > 1:
        assert positions.shape[-1] == queries
        assert bool((positions.diff(dim=-1) == 1).all()), "gaps in position_ids: read as packed sequences"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(keys - queries)
    allowed = allowed[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, None, :]
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for flash_attention_2 where it is looked up; only for text models, a packed tower keeps its own."""
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "flash_attention_2", reference_flash)
    monkeypatch.setitem(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, "flash_attention_2", flash_attention_mask)


class FlashText:
    """Set the stand-in for the text model only, without the library's check that the kernel is installed."""

    def __init__(self, model: Any) -> None:
        self.config = oracle.text_model(model).config

    def __enter__(self) -> None:
        self.before = self.config._attn_implementation
        self.config._attn_implementation_internal = "flash_attention_2"

    def __exit__(self, *_: object) -> None:
        self.config._attn_implementation_internal = self.before


def prove(t: tiny.TinyModel, inputs: tiny.Inputs, method: str) -> None:
    """Squeeze under the stand-in; the masked dense model under sdpa says the same."""
    forced = oracle.forced_tokens(inputs["input_ids"].shape[0], STEPS)
    with FlashText(t.model), matrix.applied(t.model, method) as handle:
        with oracle.capture(t.model, range(4)) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        generated = oracle.generate(t.model, inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
    merged = {c.layer: oracle.leading(states[c.layer], c.kept) for c in cuts} if matrix.method(method).merges else None
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, merged, repack)
    oracle.assert_steps(squeezed, expected, inputs, cuts, method)
    if bool(inputs["attention_mask"][:, -1].all()):
        oracle.assert_close(generated[:, 1:], expected.decode, "generate")


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_the_stand_in_is_attention(family: str) -> None:
    """Dense, the stand-in and sdpa agree, also on padded batches."""
    t = tiny.load(family)
    for inputs in (t.inputs["image"], t.batch().inputs, t.batch(side="right").inputs):
        forced = oracle.forced_tokens(inputs["input_ids"].shape[0], 2)
        expected = oracle.run(t.model, inputs, forced)
        with FlashText(t.model):
            got = oracle.run(t.model, inputs, forced)
        oracle.assert_steps(got, expected, inputs, [], family)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_one_prompt(family: str, method: str) -> None:
    t = tiny.load(family)
    prove(t, t.inputs["image"], method)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_padded_batch(family: str, method: str, side: str) -> None:
    t = tiny.load(family)
    prove(t, t.batch(side=side).inputs, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_without_a_cache(family: str, method: str) -> None:
    """No cache and no mask: gaps in position_ids must not be read as packed sequences."""
    t = tiny.load(family)
    inputs = {k: v for k, v in t.inputs["image"].items() if k != "attention_mask"}
    with matrix.applied(t.model, method), torch.no_grad():
        expected = t.model(**inputs, use_cache=False).logits
        with FlashText(t.model):
            got = t.model(**inputs, use_cache=False).logits
    oracle.assert_close(got, expected, "no cache")


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_several_tokens_in_one_decode_step(family: str) -> None:
    """Prompt lookup feeds several tokens at once."""
    t = tiny.load(family)
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    for method in METHODS:
        with FlashText(t.model), matrix.applied(t.model, method):
            greedy = t.model.generate(**t.inputs["image"], **settings)
            lookup = t.model.generate(**t.inputs["image"], **settings, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, lookup.sequences)
        oracle.assert_close(torch.stack(lookup.logits[:STEPS]), torch.stack(greedy.logits[:STEPS]), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_rows_without_padding_that_keep_different_numbers(family: str, method: str) -> None:
    """Nothing is padded and the mask is None; behind the cut the rows differ in length and need a key mask."""
    t = tiny.load(family)
    inputs, singles = matrix.even_batch(t)
    forced = oracle.forced_tokens(2, STEPS)
    with matrix.applied(t.model, method):
        with FlashText(t.model):
            joint = oracle.run(t.model, inputs, forced)
        for b, single in enumerate(singles):
            alone = oracle.run(t.model, single, forced[b : b + 1])
            oracle.assert_close(joint.prefill[b : b + 1], alone.prefill, f"row {b} prefill")
            oracle.assert_close(joint.decode[b : b + 1], alone.decode, f"row {b} decode")


@pytest.mark.parametrize("method", ["random", "fastv"])
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_family_without_a_row_proves_itself(monkeypatch: pytest.MonkeyPatch, family: str, method: str) -> None:
    """The self-check of the first call masks queries by keys, which FlashAttention cannot; it says what it cuts."""
    t = tiny.load(family)
    monkeypatch.delitem(TABLE, t.model.config.model_type)
    prove(t, t.inputs["image"], method)
    with FlashText(t.model):
        assert squeeze.check(t.model, run=True)["self_check"]["result"] == "passed"
        assert oracle.text_model(t.model).config._attn_implementation == "flash_attention_2"
