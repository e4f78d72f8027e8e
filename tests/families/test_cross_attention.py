"""Mllama: the text attends to its pictures; a cut takes keys away, as masks do that close them in the dense model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mllm_squeeze as squeeze
import oracle
import tiny
from families import keyed, proof
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.registry import unregister_reducer

pytestmark = pytest.mark.quick
FAMILY = "mllama"
KINDS = ("image", "two_images")
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
# Keys of a tile, and of a picture with its padding tile.
TILE, PICTURE = 17, 34


@pytest.fixture
def t() -> tiny.TinyModel:
    return tiny.load(FAMILY)


def clones(inputs: tiny.Inputs) -> tiny.Inputs:
    return {k: v.clone() for k, v in inputs.items()}


def states_of(t: tiny.TinyModel, inputs: tiny.Inputs) -> Tensor:
    """Return what the dense model makes keys of, (B, K, D)."""
    with keyed.attended(t.model) as seen:
        proof.forward(t, inputs)
    return seen[0].reshape(len(inputs["input_ids"]), -1, seen[0].shape[-1])


def prove(t: tiny.TinyModel, inputs: tiny.Inputs, method: Any, **params: Any) -> Any:
    """Compare prefill and each step of generate() with the dense model whose dropped keys are closed."""
    forced = oracle.forced_tokens(len(inputs["input_ids"]), proof.STEPS)
    params = params or ({"ratio": 0.5} if isinstance(method, str) else {})
    with squeeze.applied(t.model, method, **params) as handle:
        with keyed.attended(t.model) as short:
            prefill = proof.forward(t, inputs)
        cuts = handle.cuts
        decode = proof.generate(t, inputs, forced)
    assert cuts, "nothing was cut"
    kept = cuts[-1].kept
    assert short[0].shape[1] == max(map(len, kept)) < keyed.width(inputs)
    merged = keyed.spread(short[0], kept, states_of(t, inputs)) if keyed.METHODS.get(handle.method) else None
    with keyed.masked_text(t.model, kept, keyed.width(inputs), merged):
        expected, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
    real = inputs["attention_mask"].bool()
    oracle.assert_close(prefill[real], expected[real], "prefill")
    oracle.assert_close(decode, steps, "decode steps")
    assert oracle.gap(prefill[:, -1], proof.forward(t, inputs)[:, -1]) > 1e-3, "the cut does not matter"
    return handle


# Cuts


@pytest.mark.parametrize("method", keyed.METHODS)
def test_ratio_zero_is_bit_equal(t: tiny.TinyModel, method: str) -> None:
    forced = oracle.forced_tokens(1, 2)
    for kind in KINDS:
        inputs = t.inputs[kind]
        dense, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
        with squeeze.applied(t.model, method, ratio=0) as handle:
            assert torch.equal(proof.forward(t, inputs), dense)
            assert torch.equal(proof.generate(t, inputs, forced), steps)
            assert handle.cuts == ()
            assert handle.report().visual_after == handle.report().visual_before > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", keyed.METHODS)
def test_a_cut_is_what_masking_is(t: tiny.TinyModel, method: str, kind: str, covers: Any) -> None:
    covers(FAMILY, "projector", "keys", "image")
    handle = prove(t, t.inputs[kind], method)
    shown = t.inputs[kind]["aspect_ratio_mask"][0]
    assert [span.length for span in handle.layout.spans] == [TILE * int(n) for n in shown.sum(-1)]
    for span, before in zip(handle.layout.spans, (TILE * int(n) for n in shown.sum(-1)), strict=True):
        kept = set(handle.cuts[-1].kept[0].tolist()) & set(span.columns)
        limit = proof.expected_count(before, 0.5)
        assert 0 < len(kept) <= limit
        assert method == "avgpool" or len(kept) == limit
    assert handle.layout.keys
    assert handle.layout.length == keyed.width(t.inputs[kind])


@pytest.mark.parametrize("method", ["divprune", "avgpool"])
def test_with_eager_masks(t: tiny.TinyModel, method: str) -> None:
    with proof.eager(t.model):
        prove(t, t.inputs["two_images"], method)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask(t: tiny.TinyModel, kind: str) -> None:
    """Tiles that fill a picture up are known by its aspect ratio, and leave."""
    inputs = {k: v for k, v in t.inputs[kind].items() if k != "cross_attention_mask"}
    handle = prove(t, inputs, "divprune")
    filling = ~t.inputs[kind]["aspect_ratio_mask"][0].bool().flatten()
    columns = filling.repeat_interleave(TILE).nonzero().flatten().tolist()
    assert not set(columns) & set(handle.cuts[0].kept[0].tolist())


def test_two_steps_in_turn(t: tiny.TinyModel) -> None:
    steps = [
        {"select": "farthest_point", "at": "keys", "ratio": 0.3},
        {"select": "even_sample", "at": {"layer": 0}, "ratio": 0.6},
    ]
    with squeeze.applied(t.model, {"method": "both", "steps": steps}) as handle:
        prefill = proof.forward(t, t.inputs["two_images"])
        first, second = (set(cut.kept[0].tolist()) for cut in handle.cuts)
        assert second < first
        assert handle.report().span_tokens == ((17, 34), (12, 24), (7, 14))
    with keyed.masked_text(t.model, handle.cuts[-1].kept, keyed.width(t.inputs["two_images"])):
        oracle.assert_close(prefill, proof.forward(t, t.inputs["two_images"]), "prefill")


def test_a_budget_in_tokens(t: tiny.TinyModel) -> None:
    handle = prove(t, t.inputs["two_images"], "divprune", keep=5)
    assert [len(set(handle.cuts[0].kept[0].tolist()) & set(s.columns)) for s in handle.layout.spans] == [5, 5]


def test_without_a_cache(t: tiny.TinyModel) -> None:
    inputs = t.inputs["image"]
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        short = proof.forward(t, inputs, use_cache=False)
        assert torch.equal(short, proof.forward(t, inputs))
        assert handle.cuts


def test_gradients_reach_what_is_kept(t: tiny.TinyModel) -> None:
    with squeeze.applied(t.model, "divprune", ratio=0.5), keyed.attended(t.model):
        loss = t.model(**clones(t.inputs["image"]), labels=t.inputs["image"]["input_ids"], use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, [t.model.model.multi_modal_projector.weight])
    assert gradient.abs().sum() > 0


def test_a_word_whose_tiles_lost_all_their_keys_sees_no_picture(t: tiny.TinyModel) -> None:
    """As a word that no tile is shown to: its row of the mask is open, and the layer's MLP leaves it out."""
    inputs = clones(t.inputs["image"])
    inputs["cross_attention_mask"][:, 4:6, :, 0] = 0
    with squeeze.applied(t.model, "divprune", keep=1) as handle:
        prefill = proof.forward(t, inputs)
    (kept,) = handle.cuts[0].kept
    assert len(kept) == 1
    sees = inputs["cross_attention_mask"][0, :, 0, int(kept) // TILE].bool()
    assert sees.any()
    if bool(sees.all()):
        inputs["cross_attention_mask"] = inputs["cross_attention_mask"].flip(-1)
        with squeeze.applied(t.model, "divprune", keep=1) as handle:
            prefill = proof.forward(t, inputs)
        sees = inputs["cross_attention_mask"][0, :, 0, int(handle.cuts[0].kept[0]) // TILE].bool()
    assert not sees.all()
    with keyed.masked_text(t.model, handle.cuts[0].kept, PICTURE):
        oracle.assert_close(prefill, proof.forward(t, inputs), "prefill")


# Batches and beams


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", keyed.METHODS)
def test_a_batch_of_different_pictures(t: tiny.TinyModel, method: str, side: str, covers: Any) -> None:
    """One and two pictures, of one and two tiles: rows keep different numbers, and the same as alone."""
    covers(FAMILY, "batch")
    batch = t.batch(KINDS, side)
    if side == "left":
        prove(t, batch.inputs, method)
    with squeeze.applied(t.model, method, ratio=0.5) as handle:
        joint, cuts = proof.forward(t, batch.inputs), handle.cuts
        assert len(cuts[0].kept[0]) != len(cuts[0].kept[1])
        for b, (single, at) in enumerate(zip(batch.singles, batch.offsets, strict=True)):
            alone = proof.forward(t, single)[0]
            assert handle.cuts[0].kept[0].tolist() == cuts[0].kept[b].tolist()
            oracle.assert_close(joint[b, at : at + len(alone)], alone, f"row {b}")


def test_uneven_rows_without_a_mask(t: tiny.TinyModel) -> None:
    inputs = {k: v for k, v in t.batch(KINDS).inputs.items() if k != "cross_attention_mask"}
    prove(t, inputs, "divprune")


class Uneven(Reducer):
    """Keeps five tokens more of each picture than of the one before."""

    places = frozenset({"projector"})
    known_count = False

    def reduce(self, tokens: VisualTokens) -> Reduction:
        rows, width = tokens.mask.shape
        return Reduction(keep=tokens.mask & (torch.arange(width) <= 5 * torch.arange(rows)[:, None]))


def test_rows_that_keep_different_numbers_of_one_size(t: tiny.TinyModel) -> None:
    """A short row is filled up with keys that every word could see, also words before the picture, which see all."""
    inputs = t.batch(("image", "image")).inputs
    inputs["cross_attention_mask"][:, 4:6] = 0
    squeeze.register_reducer("uneven", Uneven)
    try:
        step = {"reducer": "uneven", "at": "projector", "ratio": 0.5}
        handle = prove(t, inputs, {"method": "uneven", "steps": [step]})
    finally:
        unregister_reducer("uneven")
    assert [len(row) for row in handle.cuts[0].kept] == [1, 6]


def test_a_row_without_a_picture_keeps_what_it_looked_at(t: tiny.TinyModel) -> None:
    """The library shows it an empty picture, which is none of ours to cut."""
    batch = t.batch(("two_images", "text"))
    forced = oracle.forced_tokens(2, 2)
    dense, steps = proof.forward(t, batch.inputs), proof.generate(t, batch.inputs, forced)
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        short, decode = proof.forward(t, batch.inputs), proof.generate(t, batch.inputs, forced)
        assert {span.sample for span in handle.layout.spans} == {0}
        assert len(handle.cuts[0].kept[1]) == keyed.width(batch.inputs)
    real = batch.inputs["attention_mask"].bool()
    oracle.assert_close(short[1][real[1]], dense[1][real[1]], "the row without a picture")
    oracle.assert_close(decode[1], steps[1], "its steps")
    with keyed.masked_text(t.model, handle.cuts[0].kept, keyed.width(batch.inputs)):
        oracle.assert_close(short[real], proof.forward(t, batch.inputs)[real], "all rows")


@pytest.mark.parametrize("method", keyed.METHODS)
def test_beams(t: tiny.TinyModel, method: str, covers: Any) -> None:
    covers(FAMILY, "beams")
    for inputs in (t.inputs["two_images"], t.batch(KINDS).inputs):
        with squeeze.applied(t.model, method, ratio=0.5) as handle:
            with keyed.attended(t.model) as short:
                several = t.model.generate(**clones(inputs), **SETTINGS, num_beams=3, num_return_sequences=2)
            kept = handle.cuts[0].kept
        merged = None
        if keyed.METHODS[method]:
            merged = keyed.spread(short[0][::3], kept[::3], states_of(t, inputs))
        assert all(torch.equal(kept[n], kept[n - n % 3]) for n in range(len(kept))), "beams keep different keys"
        with keyed.masked_text(t.model, kept[::3], keyed.width(inputs), merged):
            expected = t.model.generate(**clones(inputs), **SETTINGS, num_beams=3, num_return_sequences=2)
        assert torch.equal(several.sequences, expected.sequences)
        oracle.assert_close(torch.stack(several.logits, 1), torch.stack(expected.logits, 1), "all beams")


def test_prompt_lookup_decoding(t: tiny.TinyModel) -> None:
    """Guesses that are taken back leave the keys of the pictures alone."""
    inputs = {k: v for k, v in t.inputs["image"].items() if k != "cross_attention_mask"}
    with squeeze.applied(t.model, "divprune", ratio=0.5):
        greedy = t.model.generate(**clones(inputs), max_new_tokens=8)
        guessed = t.model.generate(**clones(inputs), max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, guessed)
