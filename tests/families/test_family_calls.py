"""Every family: padded batches, beams, a second turn, decoding on fewer entries, and removal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import matrix
import mllm_squeeze as squeeze
import oracle
import proof
import snapshot
import tiny
from unit.test_tiny_families import groups

NEW = 4
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def batches() -> list[Any]:
    """Return (family, kinds) of each group of prompts that one batch may hold."""
    out = []
    for family in proof.SERVED:
        for kinds in groups(family, tiny.kinds(family)):
            out.append(pytest.param(family, kinds, id=f"{family}-{kinds[0]}", marks=proof.marks(family)))
    return out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize(("family", "kinds"), batches())
def test_a_row_of_a_left_padded_batch_is_the_prompt_alone(
    family: str, kinds: tuple[str, ...], method: str, covers: Any
) -> None:
    """Rows with other sizes, lengths and numbers of pieces: the same tokens stay, and the same is said."""
    covers(family, "batch")
    t = tiny.load(family)
    batch, forced = t.batch(kinds), oracle.forced_tokens(len(kinds), 2)
    with squeeze.applied(t.model, method, **proof.params(family, method)) as handle:
        joint = proof.generate(t, batch.inputs, forced)
        cuts = handle.cuts
        for b, single in enumerate(batch.singles):
            alone = proof.generate(t, single, forced[b : b + 1])
            if kinds[b] != "text":
                kept = [(c.kept[b] - batch.offsets[b]).tolist() for c in cuts]
                assert kept == [c.kept[0].tolist() for c in handle.cuts], f"row {b}"
            oracle.assert_close(joint[b : b + 1], alone, f"row {b}")


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("family", proof.families())
def test_beams(family: str, method: str) -> None:
    """Beams of the dense model with the dropped columns closed, or where no mask does that, one beam is greedy."""
    t = tiny.load(family)
    kind = proof.shown(family)[-1]
    with proof.whole(t, kind, method) as (handle, inputs):
        beams = t.model.generate(**inputs, **SETTINGS, num_beams=3, num_return_sequences=2)
        assert beams.sequences.shape[0] == 2
        cuts, repack = handle.cuts, proof.repacks(handle)
        greedy = t.model.generate(**inputs, **SETTINGS)
        alone = t.model.generate(**inputs, **SETTINGS, num_beams=1)
        assert torch.equal(greedy.sequences, alone.sequences)
    if oracle.recurrent(t.model):
        return
    single = [oracle.Drop(c.layer, c.kept[:1]) for c in cuts]
    with oracle.masked(t.model, inputs["input_ids"].shape[1], single, repack=repack):
        expected = t.model.generate(**inputs, **SETTINGS, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams.sequences, expected.sequences)
    oracle.assert_close(torch.stack(beams.logits, 1), torch.stack(expected.logits, 1), "logits of all beams")


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("family", proof.families([f for f in proof.SERVED if f not in proof.OWN_GENERATE]))
def test_a_second_turn_on_the_same_cache(family: str, method: str, covers: Any) -> None:
    """generate() on the cache of the first turn says what one prompt with the whole conversation says."""
    covers(family, "turns")
    t = tiny.load(family)
    answer, forced = oracle.forced_tokens(1, 3, seed=1), oracle.forced_tokens(1, 2)
    settings = SETTINGS | {"max_new_tokens": answer.shape[1] + 1}
    with proof.whole(t, proof.first_kind(family, method), method) as (handle, inputs):
        processor = oracle.force(answer, inputs["input_ids"].shape[1])
        turn = t.turn(inputs, answer, 50, 51, 52, 53).whole
        text = {k: v for k, v in turn.items() if k in TEXT}
        first = t.model.generate(**inputs, **settings, logits_processor=processor)
        cuts, repack = handle.cuts, proof.repacks(handle)
        second = proof.generate(t, text, forced, past_key_values=first.past_key_values)
    if family in proof.PREFIX:
        with oracle.masked(t.model, inputs["input_ids"].shape[1], cuts, repack=repack):
            first = t.model.generate(**inputs, **settings, logits_processor=processor)
            expected = proof.generate(t, text, forced, past_key_values=first.past_key_values)
    else:
        expected = one_shot(t, proof.followed(t, turn, forced), cuts, repack)[:, -forced.shape[1] - 1 :]
    oracle.assert_close(second, expected, "second turn")


def one_shot(t: tiny.TinyModel, inputs: tiny.Inputs, cuts: Any, repack: bool) -> torch.Tensor:
    """Return the logits (1, T', V) of a whole conversation of which the first prompt was cut."""
    if oracle.recurrent(t.model):
        return oracle.dropped_logits(t.model, inputs, cuts, repack)
    prompt = int(cuts[0].kept[0][-1]) + 1
    with oracle.masked(t.model, prompt, cuts, repack=repack):
        return proof.forward(t, inputs)


@pytest.mark.parametrize("family", proof.families([f for f in proof.SERVED if f not in proof.OWN_GENERATE]))
def test_fewer_entries_while_decoding(family: str, covers: Any) -> None:
    """What a step chose not to see is closed in the dense model, for this step only."""
    t = tiny.load(family)
    layers = len(oracle.text_model(t.model).layers)
    layer = next((n for n in range(2, layers) if n - 1 not in oracle.recurrent(t.model)), 0)
    recipe = {
        "method": "decode",
        "steps": [
            {"reducer": "uniform_stride", "at": "projector", "ratio": 0.25},
            {"reducer": "decode_refresh", "at": {"cache": "decode"}, "layer": layer, "drop": 0.5, "threshold": 0.9},
        ],
    }
    inputs = {k: v.clone() for k, v in t.inputs[tiny.kinds(family)[0]].items()}
    forced, width = oracle.forced_tokens(1, 3), inputs["input_ids"].shape[1]
    covers(family, "cache")
    with squeeze.applied(t.model, recipe) as handle, torch.no_grad():
        out = t.model(**inputs, use_cache=True)
        (cut,), cache = handle.cuts, out.past_key_values
        got, seen = [], []
        for n in range(forced.shape[1]):
            got.append(t.model(input_ids=forced[:, n : n + 1], past_key_values=cache, **later(t, inputs, n)).logits)
            notes = cache.layers[layer].notes
            open_ = notes["kept"][0] | ~t.visual(inputs)[0][cut.kept[0]]
            assert 0 < int((~open_).sum())
            seen.append(cut.kept[0][open_])
    dense: Any = None
    with torch.no_grad():
        for n in range(-1, forced.shape[1]):
            now = [cut] if n < 0 else [cut, oracle.Drop(layer, [seen[n]])]
            with oracle.masked(t.model, width, now):
                if n < 0:
                    dense = t.model(**inputs, use_cache=True).past_key_values
                    continue
                out = t.model(input_ids=forced[:, n : n + 1], past_key_values=dense, **later(t, inputs, n))
            oracle.assert_close(got[n], out.logits, f"step {n}")


def later(t: tiny.TinyModel, inputs: tiny.Inputs, step: int) -> dict[str, Any]:
    """Return what a family wants in a decode step besides the token and the cache."""
    mask = inputs["attention_mask"]
    return {"attention_mask": torch.cat([mask, mask.new_ones(1, step + 1)], -1)}


@pytest.mark.parametrize("method", ["divprune", "fastv", "visionzip", "tome"])
@pytest.mark.parametrize("family", proof.families())
def test_everything_is_put_back(family: str, method: str) -> None:
    t = tiny.load(family)
    if proof.misfit(family, method):
        before = snapshot.snapshot(t.model)
        with pytest.raises(squeeze.SqueezeError):
            squeeze.apply(t.model, method)
        snapshot.assert_same(before, snapshot.snapshot(t.model))
        return
    inputs, forced = t.inputs[proof.first_kind(family, method)], oracle.forced_tokens(1, 1)
    dense, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
    before = snapshot.snapshot(t.model)
    with squeeze.applied(t.model, method, **proof.params(family, method)):
        proof.forward(t, inputs)
        proof.generate(t, inputs, forced)
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    assert torch.equal(proof.forward(t, inputs), dense)
    assert torch.equal(proof.generate(t, inputs, forced), steps)


def test_the_methods_are_those_of_the_matrix() -> None:
    assert set(proof.PLACES) <= set(matrix.METHODS)
