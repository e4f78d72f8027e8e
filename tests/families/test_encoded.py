"""Decoders that attend to what an encoder gave: rows of pictures leave, as if masks closed them in the dense model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mllm_squeeze as squeeze
import oracle
import snapshot
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import find_parts
from tiny.encoded_line import ENCODED_LINE
from tiny.parts import BOS

pytestmark = pytest.mark.quick
METHODS = ("divprune", "uniform", "random")
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}


@functools.cache
def load(name: str) -> Any:
    return ENCODED_LINE[name].model()


def shown(name: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in ENCODED_LINE[name].inputs().items()}


def forward(name: str) -> Tensor:
    ids = torch.tensor([[BOS, 20, 21, 22]]).repeat(2, 1)
    with torch.no_grad():
        return load(name)(**shown(name), decoder_input_ids=ids).logits


def generate(name: str, **settings: Any) -> Any:
    return load(name).generate(**shown(name), **SETTINGS, **settings)


@contextmanager
def masked(name: str, kept: list[Tensor]) -> Iterator[None]:
    """Close all other rows of the encoder for the dense decoder, in every pass."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        states, mask = kwargs["encoder_hidden_states"], kwargs.get("encoder_attention_mask")
        open_ = torch.zeros(len(kept), states.shape[1], dtype=torch.long)
        for row, columns in enumerate(kept):
            open_[row, columns] = 1
        open_ = open_.repeat_interleave(len(states) // len(kept), 0)
        return args, {**kwargs, "encoder_attention_mask": open_ if mask is None else mask.long() * open_}

    handle = find_parts(load(name)).decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ENCODED_LINE)
def test_ratio_zero_is_bit_equal_and_all_is_put_back(name: str, method: str) -> None:
    dense, steps = forward(name), generate(name).sequences
    before = snapshot.snapshot(load(name))
    with squeeze.applied(load(name), method, ratio=0) as handle:
        assert torch.equal(forward(name), dense)
        assert torch.equal(generate(name).sequences, steps)
        assert handle.cuts == ()
    snapshot.assert_same(before, snapshot.snapshot(load(name)))
    assert torch.equal(forward(name), dense)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ENCODED_LINE)
def test_a_cut_is_what_masking_is(name: str, method: str, request: pytest.FixtureRequest) -> None:
    """In a pass of several words, and in each step of generate(), with one beam and with several."""
    for column in ("projector", "keys", "image", "batch", "beams"):
        request.node.user_properties.append(("proves", [name, column, ""]))
    dense = forward(name)
    for beams in (1, 3):
        with squeeze.applied(load(name), method, ratio=0.5) as handle:
            short, cuts, layout = forward(name), handle.cuts, handle.layout
            found = generate(name, num_beams=beams)
            assert [row.tolist() for row in handle.cuts[0].kept[::beams]] == [row.tolist() for row in cuts[0].kept]
        kept = cuts[-1].kept
        for row, columns in enumerate(kept):
            visual = int(layout.visual[row].sum())
            assert 0 < int(layout.visual[row][columns].sum()) <= visual - visual // 2
            words = layout.real[row] & ~layout.visual[row]
            assert bool(torch.isin(words.nonzero().flatten(), columns).all()), "a word left"
        with masked(name, kept):
            oracle.assert_close(short, forward(name), "words")
            expected = generate(name, num_beams=beams)
        assert torch.equal(found.sequences, expected.sequences)
        oracle.assert_close(torch.stack(found.logits, 1), torch.stack(expected.logits, 1), "steps")
    assert oracle.gap(short, dense) > 1e-3, "the cut does not matter"


@pytest.mark.parametrize("name", ENCODED_LINE)
def test_rows_that_keep_different_numbers(name: str) -> None:
    with squeeze.applied(load(name), "divprune", ratio=[0.25, 0.75]) as handle:
        short, kept, found = forward(name), handle.cuts[-1].kept, generate(name)
    assert len(kept[0]) > len(kept[1])
    with masked(name, kept):
        oracle.assert_close(short, forward(name), "words")
        expected = generate(name)
    oracle.assert_close(torch.stack(found.logits, 1), torch.stack(expected.logits, 1), "steps")


@pytest.mark.parametrize("name", ENCODED_LINE)
def test_what_is_merged_is_what_the_decoder_is_given(name: str) -> None:
    """The dense decoder, handed the merged rows in every pass, says the same."""
    decoder, given = find_parts(load(name)).decoder, []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.append((kwargs["encoder_hidden_states"], kwargs.get("encoder_attention_mask")))

    def hand(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "encoder_hidden_states": given[0][0], "encoder_attention_mask": given[0][1]}

    dense = generate(name)
    with squeeze.applied(load(name), "avgpool", ratio=0.75) as handle:
        noting = decoder.register_forward_pre_hook(note, with_kwargs=True)
        found = generate(name)
        noting.remove()
        assert given[0][0].shape[1] == max(len(row) for row in handle.cuts[0].kept) < handle.layout.length
    handing = decoder.register_forward_pre_hook(hand, with_kwargs=True)
    try:
        expected = generate(name)
    finally:
        handing.remove()
    oracle.assert_close(torch.stack(found.logits, 1), torch.stack(expected.logits, 1), "steps")
    assert oracle.gap(torch.stack(found.logits, 1), torch.stack(dense.logits, 1)) > 1e-4, "the merge does not matter"


@pytest.mark.parametrize("name", ENCODED_LINE)
def test_a_request_has_its_own_budget(name: str) -> None:
    with squeeze.applied(load(name), "divprune", ratio=0.75):
        expected = forward(name)
    with squeeze.applied(load(name), "divprune", ratio=0.25) as handle:
        outside = forward(name)
        with handle.using(ratio=0.75) as call:
            assert torch.equal(forward(name), expected)
        assert call.cuts and not torch.equal(outside, expected)
        with handle.using(off=True):
            dense = forward(name)
    assert torch.equal(dense, forward(name))


@pytest.mark.parametrize("name", ENCODED_LINE)
def test_the_cache_is_shorter_and_guarded(name: str) -> None:
    with squeeze.applied(load(name), "divprune", ratio=0.5) as handle:
        found = generate(name)
        cache = found.cache if hasattr(found, "cache") else found.past_key_values
        most = max(len(row) for row in handle.cuts[0].kept)
        assert most < handle.layout.length
        assert {layer.values.shape[-2] for layer in cache.cross_attention_cache.layers} == {most}
    with pytest.raises(squeeze.SqueezeError, match="no longer applied"):
        _ = cache.cross_attention_cache.layers[0].keys


@pytest.mark.parametrize("name", ENCODED_LINE)
def test_what_reads_the_text_model_is_refused(name: str) -> None:
    for method in ("fastv", "tome", "cdpruner"):
        with pytest.raises(UnsupportedModelError):
            squeeze.apply(load(name), method)
    assert squeeze.check(load(name))["methods"]["divprune"] == "fits"
