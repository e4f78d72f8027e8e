"""Mllama: what a reducer is shown, what the report tells, what is refused, and that everything is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import keyed, proof
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need
from mllm_squeeze.registry import unregister_reducer

pytestmark = pytest.mark.quick
FAMILY = "mllama"
KINDS = ("image", "two_images")
# Keys of a tile.
TILE = 17


@pytest.fixture
def t() -> tiny.TinyModel:
    return tiny.load(FAMILY)


@pytest.fixture
def applied(t: tiny.TinyModel) -> Iterator[Any]:
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        yield handle


class ReadsWords(Reducer):
    """Keeps the first tokens; remembers the words that it was shown."""

    places = frozenset({"projector"})

    def needs(self) -> tuple[Need, ...]:
        return (Features(), Features("text"))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        SHOWN.append(tokens)
        place = torch.arange(tokens.mask.shape[1])
        return Reduction(keep=tokens.mask & (place < tokens.budget[:, None]))


SHOWN: list[VisualTokens] = []


def test_a_reducer_that_reads_the_words_gets_them(t: tiny.TinyModel) -> None:
    batch = t.batch(KINDS)
    # Two words come before the first row's picture.
    at = batch.offsets[0]
    batch.inputs["input_ids"][0, [at, at + 2]] = batch.inputs["input_ids"][0, [at + 2, at]]
    squeeze.register_reducer("reads_words", ReadsWords)
    SHOWN.clear()
    try:
        step = {"reducer": "reads_words", "at": "projector", "ratio": 0.5}
        with squeeze.applied(t.model, {"method": "words", "steps": [step]}):
            proof.forward(t, batch.inputs)
    finally:
        unregister_reducer("reads_words")
    (tokens,) = SHOWN
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    table = t.model.get_input_embeddings().weight
    for row, sample in enumerate((0, 1, 1)):
        picture = ids[sample] == tiny.FAMILIES[FAMILY].visual_ids[0]
        words = mask[sample] & ~picture & (picture.cumsum(0) > 0)
        assert torch.equal(tokens[Features("text")][row][tokens.words[row]], table[ids[sample][words]])
    assert [len(tiles) for tiles in tokens.tiles] == [2, 1, 2]
    assert (tokens.grid[0, 0] == -1).all(), "the CLS token of a tile shows no piece of it"
    assert tokens.grid[0, 1].tolist() == [0, 0, 0, 0]
    assert tokens.grid[0, TILE + 1].tolist() == [1, 0, 0, 0]


def test_the_report_counts_keys(t: tiny.TinyModel, applied: Any) -> None:
    """Two tiles of 17 keys to 17, in layers 1 and 3 of 5; seven words."""
    proof.forward(t, t.inputs["image"])
    report = applied.report()
    words, text = t.inputs["image"]["input_ids"].shape[1], t.model.config.get_text_config()
    assert report.span_tokens == ((34,), (17,))
    assert report.record.layout_length == words
    assert report.record.layer_lengths == (words,) * 5
    assert report.visual_per_layer == (0, 17, 0, 17, 0)
    hidden, heads, size, inner = text.hidden_size, text.num_attention_heads, 16, text.intermediate_size
    each = 2 * words * hidden * 2 * heads * size + 6 * words * hidden * inner

    def flops(keys: int) -> int:
        plain = each + 2 * words * hidden * 2 * 2 * size + 4 * words * words * heads * size
        crossed = each + 2 * keys * hidden * 2 * 2 * size + 4 * words * keys * heads * size
        return 3 * plain + 2 * crossed + 2 * hidden * text.vocab_size

    assert report.flops_dense == flops(34)
    assert report.flops == flops(17)
    assert report.cache_bytes_dense == (3 * words + 2 * 34) * 2 * 2 * size * 4
    assert report.cache_bytes == (3 * words + 2 * 17) * 2 * 2 * size * 4
    said = str(report)
    assert "keys per cross-attention layer" in said
    assert f"prompt of {words}" in said
    assert "tokens per layer (mean)" not in said


# Text, refusals, removal


def test_text_alone_warns(t: tiny.TinyModel) -> None:
    dense = proof.forward(t, t.inputs["text"])
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        with pytest.warns(squeeze.SqueezeWarning, match="nothing was cut"):
            assert torch.equal(proof.forward(t, t.inputs["text"]), dense)
        assert handle.cuts == ()
        with handle.disabled():
            assert torch.equal(proof.forward(t, t.inputs["text"]), dense)


DECODE = {"reducer": "decode_refresh", "at": {"cache": "decode"}, "layer": 2}
UNIFORM = {"select": "even_sample", "ratio": 0.5}
# Recipes that cannot be served, the column of the page they stand for, and what the message says they do.
UNFIT: dict[str, tuple[Any, str, str]] = {
    "tome": ("tome", "encoder", "merges tokens inside the vision encoder"),
    "visionzip": ("visionzip", "scores", "reads the attention of the vision encoder"),
    "fastv": ("fastv", "layer", "cuts at decoder layer 2"),
    "pyramiddrop": ("pyramiddrop", "layers", "cuts at decoder layer 1, 3, 4"),
    "sparsevlm": ("sparsevlm", "layers", "cuts at decoder layer"),
    "dart": ("dart", "layer", "cuts at decoder layer 2"),
    "random at 1": ({"method": "mine", "steps": [{**UNIFORM, "at": {"layer": 1}}]}, "layer", "cuts at decoder layer 1"),
    "decode": (
        {"method": "mine", "steps": [{**UNIFORM, "at": "projector"}, DECODE]},
        "cache",
        "chooses entries of the cache",
    ),
    "two layers": ({"method": "mine", "steps": [{**UNIFORM, "at": {"layers": [0, 2]}}]}, "layers", "layer 0, 2"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_says_why_and_what_does(t: tiny.TinyModel, name: str, covers: Any) -> None:
    method, column, does = UNFIT[name]
    before = snapshot.snapshot(t.model)
    with pytest.raises(UnsupportedModelError, match=does) as caught:
        squeeze.apply(t.model, method)
    assert "keys of cross-attention layers" in str(caught.value)
    reason, _, closest = str(caught.value).partition(" Methods that fit this model, the closest first: ")
    named = closest.rstrip(".").split(", ")
    assert 1 <= len(named) <= 3
    for name in named:
        squeeze.apply(t.model, name).remove()
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    covers(FAMILY, column, refused=reason)


def test_what_fits_is_what_check_says(t: tiny.TinyModel) -> None:
    fits = {name for name, said in squeeze.check(t.model)["methods"].items() if said == "fits"}
    assert fits == set(keyed.FIT)
    for name in set(squeeze.methods()) - fits:
        with pytest.raises(UnsupportedModelError):
            squeeze.apply(t.model, name)


def test_everything_is_put_back(t: tiny.TinyModel) -> None:
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, 1)
    dense, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
    before = snapshot.snapshot(t.model)
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        assert not torch.equal(proof.forward(t, inputs), dense)
        proof.generate(t, inputs, forced)
        with handle.disabled():
            assert torch.equal(proof.forward(t, inputs), dense)
            assert torch.equal(proof.generate(t, inputs, forced), steps)
        with pytest.raises(squeeze.SqueezeError, match="copy or a pickle of it would carry its hooks"):
            copy.deepcopy(t.model)
        with pytest.raises(squeeze.SqueezeError, match="copy or a pickle of it would carry its hooks"):
            copy.deepcopy(oracle.text_model(t.model))
        with pytest.raises(squeeze.SqueezeError, match="speaks of 34 keys.* have 68"):
            proof.forward(t, {**inputs, "cross_attention_mask": inputs["cross_attention_mask"][:, :, :, :1]})
        assert not torch.equal(proof.forward(t, inputs), dense)
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    assert torch.equal(proof.forward(t, inputs), dense)
    assert torch.equal(proof.generate(t, inputs, forced), steps)
