"""Mllama's cache: which keys are left lives in it, so that beams, copies, turns and other methods read it rightly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import cache_role
import mllm_squeeze as squeeze
import oracle
import tiny
from families import keyed, proof

pytestmark = pytest.mark.quick
FAMILY = "mllama"
KINDS = ("image", "two_images")
# Keys of a picture with its padding tile, and the layers that attend to them.
PICTURE, LAYERS = 34, (1, 3)


@pytest.fixture
def t() -> tiny.TinyModel:
    return tiny.load(FAMILY)


def prefill(t: tiny.TinyModel, kind: str) -> Any:
    """Return the cache behind a prompt, and the row of the mask for words that follow."""
    cache = transformers.DynamicCache(config=t.model.config.get_text_config())
    proof.forward(t, t.inputs[kind], **cache_role.given(cache), use_cache=True)
    return cache, t.inputs[kind]["cross_attention_mask"][:, -1:]


def step(t: tiny.TinyModel, cache: Any, mask: Tensor | None, token: int = 50, rows: int = 1) -> Tensor:
    ids = torch.full((rows, 1), token)
    with torch.no_grad():
        return t.model(input_ids=ids, **cache_role.given(cache), use_cache=True, **so_far(cache, mask, 1)).logits


def so_far(cache: Any, mask: Tensor | None, words: int) -> dict[str, Tensor]:
    """Return the mask of the whole conversation, of which transformers takes the rows of this pass."""
    return {} if mask is None else {"cross_attention_mask": mask.repeat(1, cache.get_seq_length() + words, 1, 1)}


def expected_steps(t: tiny.TinyModel, kind: str, kept: list[Tensor], count: int) -> list[Tensor]:
    with keyed.masked_text(t.model, kept, keyed.width(t.inputs[kind])):
        cache, mask = prefill(t, kind)
        return [step(t, cache, mask) for _ in range(count)]


@pytest.fixture
def applied(t: tiny.TinyModel) -> Iterator[Any]:
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        yield handle


def test_the_cache_is_shorter(t: tiny.TinyModel, applied: Any) -> None:
    cache, mask = prefill(t, "two_images")
    kept = len(applied.cuts[0].kept[0])
    step(t, cache, mask)
    held = [layer.values.shape[-2] for layer in cache.layers]
    words = t.inputs["two_images"]["input_ids"].shape[1] + 1
    assert held == [kept if n in LAYERS else words for n in range(5)]
    assert cache.get_seq_length() == words


def test_a_step_without_a_mask(t: tiny.TinyModel, applied: Any) -> None:
    cache, _ = prefill(t, "image")
    found = step(t, cache, None)
    kept = applied.cuts[0].kept
    with keyed.masked_text(t.model, kept, PICTURE), applied.disabled():
        dense, _ = prefill(t, "image")
        oracle.assert_close(found, step(t, dense, None), "step")


def test_two_caches_in_turn(t: tiny.TinyModel) -> None:
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        (one, first), kept_one = prefill(t, "image"), handle.cuts[0].kept
        (two, second), kept_two = prefill(t, "two_images"), handle.cuts[0].kept
        found = [(step(t, one, first), step(t, two, second)) for _ in range(3)]
    for (a, b), x, y in zip(
        found, expected_steps(t, "image", kept_one, 3), expected_steps(t, "two_images", kept_two, 3), strict=True
    ):
        oracle.assert_close(a, x, "first cache")
        oracle.assert_close(b, y, "second cache")


@pytest.mark.parametrize("made", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache(t: tiny.TinyModel, applied: Any, made: Any) -> None:
    cache, mask = prefill(t, "image")
    twin = made(cache)
    step(t, cache, mask, token=60)
    found = step(t, twin, mask)
    kept = applied.cuts[0].kept
    with applied.disabled():
        oracle.assert_close(found, expected_steps(t, "image", kept, 1)[0], "the copy")


def test_a_copy_is_read_by_nobody_else(t: tiny.TinyModel) -> None:
    """Also not while the pass runs that may read the cache it was made of."""
    with squeeze.applied(t.model, "divprune", ratio=0.5):
        cache, mask = prefill(t, "image")
        twin = pickle.loads(pickle.dumps(cache))
    with pytest.raises(squeeze.SqueezeError, match="no longer applied"):
        step(t, twin, mask)


class Quantised(transformers.cache_utils.DynamicLayer):
    """Stands for layers that keep their entries otherwise, as quantised ones do."""


def test_a_cache_that_cannot_be_cut_serves_where_nothing_is(t: tiny.TinyModel) -> None:
    def run() -> Tensor:
        cache = transformers.cache_utils.Cache(layer_class_to_replicate=Quantised)
        return proof.forward(t, t.inputs["image"], **cache_role.given(cache), use_cache=True)

    expected = run()
    with squeeze.applied(t.model, "divprune", ratio=0):
        assert torch.equal(run(), expected)
    with squeeze.applied(t.model, "divprune", ratio=0.5), pytest.raises(squeeze.SqueezeError, match="Quantised"):
        run()


def test_rows_repeated_and_selected(t: tiny.TinyModel, applied: Any) -> None:
    """Repeat, reorder and select rows of a batch whose rows keep different numbers."""
    batch = t.batch(KINDS)
    cache = transformers.DynamicCache(config=t.model.config.get_text_config())
    proof.forward(t, batch.inputs, **cache_role.given(cache), use_cache=True)
    mask = batch.inputs["cross_attention_mask"][:, -1:]
    attention = torch.cat([batch.inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    other, plain = copy.deepcopy(cache), copy.deepcopy(cache)

    def say(cache: Any, rows: Tensor) -> Tensor:
        given = {**so_far(cache, mask[rows], 1), "attention_mask": attention[rows]}
        with torch.no_grad():
            return t.model(input_ids=torch.full((len(rows), 1), 50), **cache_role.given(cache), **given).logits

    both = say(plain, torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    oracle.assert_close(say(cache, torch.tensor([0, 0, 1, 1])), both[[0, 0, 1, 1]], "repeated")
    other.reorder_cache(torch.tensor([1, 0]))
    again = copy.deepcopy(other)
    oracle.assert_close(say(other, torch.tensor([1, 0])), both[[1, 0]], "reordered")
    again.batch_select_indices(torch.tensor([1]))
    oracle.assert_close(say(again, torch.tensor([0])), both[[0]], "selected")


def test_words_that_are_taken_back(t: tiny.TinyModel, applied: Any) -> None:
    """A cropped cache has forgotten the last words, and nothing of the pictures."""
    cache, mask = prefill(t, "image")
    first = step(t, cache, mask)
    step(t, cache, mask, token=60)
    cache.crop(-2)
    assert torch.equal(step(t, cache, mask), first)


@pytest.mark.parametrize("masked", [True, False])
def test_a_cut_cache_cannot_be_read_without_the_method(t: tiny.TinyModel, masked: bool) -> None:
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        cache, mask = prefill(t, "image")
        kept = handle.cuts[0].kept
    with pytest.raises(squeeze.SqueezeError, match="no longer applied"):
        step(t, copy.deepcopy(cache), mask if masked else None)
    # Another method serves it as it was cut, and so does a handle that is switched off.
    with squeeze.applied(t.model, "random", ratio=0.9) as handle:
        found = step(t, copy.deepcopy(cache), mask)
        with handle.disabled():
            assert torch.equal(step(t, copy.deepcopy(cache), mask), found)
    oracle.assert_close(found, expected_steps(t, "image", kept, 1)[0], "step")
    with pytest.raises(squeeze.SqueezeError, match="no longer applied"):
        step(t, cache, mask if masked else None)


def test_a_cache_that_was_reset_is_free(t: tiny.TinyModel, applied: Any) -> None:
    cache, _ = prefill(t, "image")
    for layer in LAYERS:
        cache.layers[layer].reset()
        assert cache.layers[layer].get_seq_length() == 0
        assert cache.layers[layer].keys is None


def test_an_interrupted_pass_opens_nothing(t: tiny.TinyModel) -> None:
    with squeeze.applied(t.model, "divprune", ratio=0.5):
        cache, mask = prefill(t, "image")
        last = oracle.text_model(t.model).layers[-1]

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = last.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            step(t, cache, mask)
        hook.remove()
    with pytest.raises(squeeze.SqueezeError, match="no longer applied"):
        step(t, cache, mask)


def test_a_static_cache_is_refused(t: tiny.TinyModel, applied: Any) -> None:
    text = t.model.config.get_text_config()
    cache = transformers.StaticCache(config=text, max_cache_len=64)
    with pytest.raises(squeeze.SqueezeError, match="StaticLayer"):
        proof.forward(t, t.inputs["image"], **cache_role.given(cache), use_cache=True)


def test_a_second_turn(t: tiny.TinyModel, covers: Any) -> None:
    """Words on the cache of the first turn, in one pass, and then step by step."""
    covers(FAMILY, "turns")
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        found, kept = talk_on(t), handle.cuts[0].kept
    with keyed.masked_text(t.model, kept, PICTURE):
        for n, (a, b) in enumerate(zip(found, talk_on(t), strict=True)):
            oracle.assert_close(a, b, f"pass {n}")


def talk_on(t: tiny.TinyModel) -> list[Tensor]:
    """Return the logits of a pass of three words behind a prompt, and of two more."""
    cache, mask = prefill(t, "image")
    with torch.no_grad():
        ids = torch.tensor([[50, 51, 52]])
        out = [t.model(input_ids=ids, **cache_role.given(cache), **so_far(cache, mask, 3)).logits]
    return [*out, step(t, cache, mask), step(t, cache, mask)]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_a_second_turn_with_a_picture(t: tiny.TinyModel, first: bool, second: bool, generate: bool) -> None:
    """Keys of the second picture join those of the first; each turn may be squeezed or not."""
    if not proof.RECENT:
        pytest.skip(f"transformers {transformers.__version__} itself is wrong in a later turn of Mllama")
    answer, forced = torch.tensor([[41, 42, 43]]), oracle.forced_tokens(1, 2)
    turn = t.turn(t.inputs["image"], answer, 50, 51, "image:1", 52, 53, 54)
    kept = [torch.arange(PICTURE), torch.arange(PICTURE)]
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        cache = show_first(t, answer, handle, first)
        if first:
            kept[0] = handle.cuts[0].kept[0]
        found = show_second(t, turn, cache, forced, generate, handle, second)
        if second:
            kept[1] = handle.cuts[0].kept[0]
            record = handle.report().record
            assert (record.keys.held_before, record.keys.held_after) == (PICTURE, len(kept[0]))
            assert record.past == t.inputs["image"]["input_ids"].shape[1] + answer.shape[1]
    # The first turn's words saw the keys of the first picture only.
    with keyed.masked_text(t.model, kept[:1], PICTURE):
        cache = show_first(t, answer)
    with keyed.masked_text(t.model, [torch.cat([kept[0], kept[1] + PICTURE])], 2 * PICTURE):
        expected = show_second(t, turn, cache, forced, generate)
    oracle.assert_close(found, expected, "second turn")


def show_first(t: tiny.TinyModel, answer: Tensor, handle: Any = None, on: bool = True) -> Any:
    """Return the cache behind the first picture and its answer."""

    def run() -> Any:
        cache, mask = prefill(t, "image")
        with torch.no_grad():
            t.model(input_ids=answer, **cache_role.given(cache), **so_far(cache, mask, answer.shape[1]))
        return cache

    if on:
        return run()
    with handle.disabled():
        return run()


def show_second(
    t: tiny.TinyModel, turn: Any, cache: Any, forced: Tensor, generate: bool, handle: Any = None, on: bool = True
) -> Tensor:
    """Return what is said to the second picture."""

    def run() -> Tensor:
        if generate:
            whole = {**turn.whole, **{k: v for k, v in turn.new.items() if k not in turn.whole or "aspect" in k}}
            whole["pixel_values"] = turn.new["pixel_values"]
            return proof.generate(t, whole, forced, **cache_role.given(cache))
        new = {**turn.new, "attention_mask": turn.whole["attention_mask"]}
        return proof.forward(t, new, **cache_role.given(cache), use_cache=True)

    if on:
        return run()
    with handle.disabled():
        return run()


def test_a_mask_that_forgets_a_picture_is_refused(t: tiny.TinyModel, applied: Any) -> None:
    cache, mask = prefill(t, "two_images")
    with pytest.raises(squeeze.SqueezeError, match="speaks of 34 keys.* have 68"):
        step(t, cache, mask[:, :, :1])
