"""Every way of generating: beams, several answers, sampling, assistants, prompt lookup, loops written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cache_role
import matrix
import oracle
import tiny

NEW = 6
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
CELLS = [(f, m) for f in matrix.FAMILIES for m in matrix.CORE]


def logits_of(out: Any) -> Tensor:
    """Return (rows, n, V), at most NEW steps: assisted decoding may hand back one more."""
    return torch.stack(out.logits[:NEW], 1)


def against_mask(t: tiny.TinyModel, inputs: tiny.Inputs, method: str, **settings: Any) -> Any:
    """Generate squeezed and with the dense masked model, compare tokens and logits, and return the squeezed output."""
    with matrix.applied(t.model, method) as handle:
        with oracle.capture(t.model, range(4)) as states:
            torch.manual_seed(5)
            squeezed = t.model.generate(**inputs, **SETTINGS, **settings)
        cuts, repack = handle.cuts, matrix.repacks(handle)
    for cut in cuts:
        group = len(cut.kept) // inputs["input_ids"].shape[0]
        for b, kept in enumerate(cut.kept):
            assert kept.tolist() == cut.kept[b - b % group].tolist(), "rows of one prompt keep different tokens"
    merged = matrix.merged(method, cuts, states)
    with oracle.masked(t.model, inputs["input_ids"].shape[1], cuts, merged, repack):
        torch.manual_seed(5)
        expected = t.model.generate(**inputs, **SETTINGS, **settings)
    assert torch.equal(squeezed.sequences, expected.sequences)
    oracle.assert_close(logits_of(squeezed), logits_of(expected), "logits of all rows")
    return squeezed


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_beam_search(family: str, method: str) -> None:
    t = tiny.load(family)
    out = against_mask(t, t.inputs[matrix.BEAM_PROMPT], method, num_beams=3, num_return_sequences=2)
    assert out.sequences.shape[0] == 2


@pytest.mark.parametrize("family", matrix.FAMILIES)
@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop"])
def test_beam_search_on_a_padded_batch(family: str, method: str) -> None:
    """Beams of prompts that keep different numbers of tokens."""
    t = tiny.load(family)
    against_mask(t, t.batch(matrix.BEAM_BATCH).inputs, method, num_beams=3)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_several_sampled_answers(family: str, method: str) -> None:
    t = tiny.load(family)
    out = against_mask(t, t.inputs["image"], method, do_sample=True, num_return_sequences=3)
    assert out.sequences.shape[0] == 3


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_one_beam_is_greedy(family: str, method: str) -> None:
    t = tiny.load(family)
    with matrix.applied(t.model, method):
        greedy = t.model.generate(**t.inputs["image"], **SETTINGS)
        beam = t.model.generate(**t.inputs["image"], **SETTINGS, num_beams=1)
    assert torch.equal(greedy.sequences, beam.sequences)
    assert torch.equal(logits_of(greedy), logits_of(beam))


def same_as_greedy(t: tiny.TinyModel, method: str, **settings: Any) -> None:
    """Compare a faster way of greedy decoding with greedy decoding, both squeezed."""
    inputs = t.inputs["image"]
    with matrix.applied(t.model, method):
        greedy = t.model.generate(**inputs, **SETTINGS)
        faster = t.model.generate(**inputs, **SETTINGS, **settings)
    assert torch.equal(greedy.sequences, faster.sequences)
    oracle.assert_close(logits_of(faster), logits_of(greedy), "logits")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_prompt_lookup(family: str, method: str, implementation: str) -> None:
    t = tiny.load(family)
    with matrix.attention(t.model, implementation):
        same_as_greedy(t, method, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_assisted_by_a_dense_model(family: str, method: str) -> None:
    t = tiny.load(family)
    same_as_greedy(t, method, assistant_model=tiny.fresh(family).model)


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
@pytest.mark.parametrize("method", matrix.CORE)
def test_a_squeezed_assistant(family: str, method: str) -> None:
    """The assistant may be squeezed: it proposes other tokens, the answer of the dense model stays."""
    t, assistant = tiny.load(family), tiny.fresh(family)
    inputs = t.inputs["image"]
    greedy = t.model.generate(**inputs, **SETTINGS)
    with matrix.applied(assistant.model, method):
        assisted = t.model.generate(**inputs, **SETTINGS, assistant_model=assistant.model)
    assert torch.equal(greedy.sequences, assisted.sequences)
    oracle.assert_close(logits_of(assisted), logits_of(greedy), "logits")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", matrix.EVERYWHERE)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_a_loop_by_hand_equals_generate(family: str, method: str, implementation: str) -> None:
    """Only the new token and the cache go in: no position_ids, no attention_mask."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, NEW)
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method), torch.no_grad():
        generated = oracle.generate(t.model, inputs, forced)
        out = t.model(**inputs, use_cache=True)
        loop = [out.logits[:, -1]]
        for n in range(NEW):
            out = t.model(input_ids=forced[:, n : n + 1], **cache_role.behind(out))
            loop.append(out.logits[:, -1])
    oracle.assert_close(torch.stack(loop, 1), generated, "by hand")


@pytest.mark.parametrize("method", matrix.EVERYWHERE)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_cached_equals_recomputed(family: str, method: str) -> None:
    """With use_cache=False the whole prompt is squeezed anew at every step."""
    t = tiny.load(family)
    inputs = t.inputs["image"]
    with matrix.applied(t.model, method), torch.no_grad():
        cached = t.model(**inputs, use_cache=True).logits
        oracle.assert_close(t.model(**inputs, use_cache=False).logits, cached, "no cache")
        bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
        oracle.assert_close(t.model(**bare, use_cache=False).logits, cached, "neither cache nor mask")
        oracle.assert_close(t.model(**bare, use_cache=True).logits, cached, "no mask")


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_several_tokens_in_one_decode_step(family: str) -> None:
    """Feeding the forced tokens at once equals feeding them one by one."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, NEW)
    for method in matrix.CORE:
        with matrix.applied(t.model, method), torch.no_grad():
            steps = oracle.run(t.model, inputs, forced)
            where = oracle.positions(t.model, inputs, NEW)
            width = inputs["input_ids"].shape[1]
            out = t.model(**inputs, position_ids=where[..., :width], use_cache=True)
            out = t.model(input_ids=forced, position_ids=where[..., width:], **cache_role.behind(out))
        oracle.assert_close(out.logits, steps.decode, method)
