"""A row of a padded batch keeps the same tokens, and answers the same, as the prompt alone."""

from __future__ import annotations

import copy

import pytest
import torch

import cache_role
import matrix
import oracle
import tiny

STEPS = 4
KINDS = {
    "image": ("image", "two_images", "text"),
    "video": ("video", "image_video", "text"),
}


def prove(family: str, method: str, kinds: tuple[str, ...], side: str) -> None:
    """Compare the batch with each of its prompts alone, and with the masked dense batch."""
    t = tiny.load(family)
    batch, forced = t.batch(kinds, side), oracle.forced_tokens(len(kinds), STEPS)
    with matrix.applied(t.model, method) as handle:
        with oracle.capture(t.model, range(4)) as states:
            joint = oracle.run(t.model, batch.inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
        for b, single in enumerate(batch.singles):
            expected = oracle.run(t.model, single, forced[b : b + 1])
            if kinds[b] == "text":
                assert all(len(c.kept[b]) == single["input_ids"].shape[1] for c in cuts)
            else:
                assert [c.layer for c in handle.cuts] == [c.layer for c in cuts]
                for mine, other in zip(cuts, handle.cuts, strict=True):
                    assert (mine.kept[b] - batch.offsets[b]).tolist() == other.kept[0].tolist(), f"row {b}"
            here = slice(batch.offsets[b], batch.offsets[b] + single["input_ids"].shape[1])
            oracle.assert_close(joint.prefill[b : b + 1, here], expected.prefill, f"row {b} prefill")
            oracle.assert_close(joint.decode[b : b + 1], expected.decode, f"row {b} decode")
    merged = {c.layer: oracle.leading(states[c.layer], c.kept) for c in cuts} if matrix.method(method).merges else None
    masked = oracle.masked_logits(t.model, batch.inputs, cuts, forced, merged, repack)
    if matrix.method(method).decodes:
        masked.decode = joint.decode[:, :0]
    oracle.assert_steps(joint, masked, batch.inputs, cuts, "batch")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "method", "kind", "implementation"), matrix.cells())
def test_row_equals_single(family: str, method: str, kind: str, implementation: str, side: str) -> None:
    prove(family, method, KINDS[kind], side)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", matrix.CORE)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_row_equals_single_with_eager_masks(family: str, method: str, side: str) -> None:
    with matrix.attention(tiny.load(family).model, "eager"):
        prove(family, method, KINDS["image"], side)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", matrix.CORE)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_generate_on_a_left_padded_batch(family: str, method: str) -> None:
    t = tiny.load(family)
    batch, forced = t.batch(), oracle.forced_tokens(3, STEPS)
    with matrix.applied(t.model, method):
        joint = oracle.generate(t.model, batch.inputs, forced)
        for b, single in enumerate(batch.singles):
            alone = oracle.generate(t.model, single, forced[b : b + 1])
            oracle.assert_close(joint[b : b + 1], alone, f"row {b}")


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_equal_rows_without_padding_need_no_mask(family: str) -> None:
    """Two equal prompts give two equal rows, and None stays None where nothing is padded."""
    t = tiny.load(family)
    batch, forced = t.batch(("image", "image")), oracle.forced_tokens(2, STEPS)
    inputs = batch.singles[0]
    twice = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
    with matrix.applied(t.model, "fastv"):
        joint = oracle.run(t.model, twice, forced)
        for b in range(2):
            alone = oracle.run(t.model, inputs, forced[b : b + 1])
            oracle.assert_close(joint.prefill[b : b + 1], alone.prefill, "prefill")
            oracle.assert_close(joint.decode[b : b + 1], alone.decode, "decode")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [matrix.KEEPS_POSITIONS, *matrix.EVERYWHERE])
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_rows_without_padding_that_keep_different_numbers(
    family: str, method: str, implementation: str, masked: bool
) -> None:
    """No row is padded and the library passes no mask; behind the cut the rows differ in length and need one."""
    t = tiny.load(family)
    inputs, singles = matrix.even_batch(t)
    forced = oracle.forced_tokens(2, STEPS)
    if not masked:
        inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method), torch.no_grad():
        out = t.model(**inputs, use_cache=True)
        again = copy.deepcopy(cache_role.of_output(out))
        prefill, at_once = out.logits, t.model(input_ids=forced, **cache_role.given(again))
        loop = []
        for n in range(STEPS):
            out = t.model(input_ids=forced[:, n : n + 1], **cache_role.behind(out))
            loop.append(out.logits[:, -1])
        for b, single in enumerate(singles):
            alone = oracle.run(t.model, single, forced[b : b + 1])
            oracle.assert_close(prefill[b : b + 1], alone.prefill, f"row {b} prefill")
            oracle.assert_close(torch.stack(loop, 1)[b : b + 1], alone.decode, f"row {b} decode")
            oracle.assert_close(at_once.logits[b : b + 1], alone.decode, f"row {b} decode at once")


@pytest.mark.parametrize("method", ["random", "fastv", "sparsevlm"])
def test_a_decoder_that_looks_both_ways(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """No mask means that all is seen there; rows that keep different numbers need one that closes padding only."""
    t = tiny.load("llava")
    inputs, singles = matrix.even_batch(t)
    with torch.no_grad():
        ahead = t.model(**inputs).logits
        for layer in oracle.text_model(t.model).layers:
            monkeypatch.setattr(layer.self_attn, "is_causal", False)
        assert (t.model(**inputs).logits[:, 0] - ahead[:, 0]).abs().max() > 0.01
        with matrix.applied(t.model, method) as handle:
            joint = t.model(**inputs).logits
            assert len({len(kept) for kept in handle.cuts[-1].kept}) == 2
            for b, single in enumerate(singles):
                oracle.assert_close(joint[b : b + 1], t.model(**single).logits, f"row {b}")
