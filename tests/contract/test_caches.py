"""Caches in other hands: made by the user, reordered, repeated, selected, filled before the picture comes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

import cache_role
import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze.engine.sequence.layer_arguments import LayerArguments

METHODS = [matrix.KEEPS_POSITIONS, *matrix.EVERYWHERE]
STEPS = 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_cache_of_the_user(family: str, method: str) -> None:
    """With the model's config or without it, a DynamicCache that the user made serves as well."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    with matrix.applied(t.model, method):
        expected = oracle.run(t.model, inputs, forced)
        for cache in (DynamicCache(), DynamicCache(config=t.model.config)):
            got = oracle.run(t.model, inputs, forced, cache=cache)
            assert torch.equal(got.prefill, expected.prefill)
            assert torch.equal(got.decode, expected.decode)


@torch.no_grad()
def decode(t: tiny.TinyModel, cache: Any, forced: Tensor, where: Tensor, mask: Tensor) -> Tensor:
    """Return the logits (B, n, V) of the forced tokens on a cache; where: position_ids of these tokens."""
    logits = []
    for n in range(forced.shape[1]):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], -1)
        at = where[..., n : n + 1]
        token = forced[:, n : n + 1]
        out = t.model(input_ids=token, attention_mask=mask, position_ids=at, **cache_role.given(cache))
        cache = cache_role.of_output(out)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_rows_of_a_cache(family: str, method: str, implementation: str) -> None:
    """Prefill three prompts; reorder, repeat or select rows of the cache; each row goes on as the prompt it now is."""
    t = tiny.load(family)
    batch = t.batch()
    inputs, mask = batch.inputs, batch.inputs["attention_mask"]
    width = mask.shape[1]
    where = oracle.positions(t.model, inputs, STEPS)[..., width:]
    forced = oracle.forced_tokens(3, STEPS)
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method):
        expected = oracle.run(t.model, inputs, forced).decode
        for order, change in (
            ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
            ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
            ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([0, 2]))),
        ):
            cache = oracle.run(t.model, inputs, forced[:, :0]).cache
            change(cache)
            got = decode(t, cache, forced[order], where[..., order, :], mask[order])
            oracle.assert_close(got, expected[order], f"rows {order}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_several_tokens_at_once_on_a_padded_batch(family: str, method: str, side: str, implementation: str) -> None:
    t = tiny.load(family)
    inputs = t.batch(side=side).inputs
    mask, width = inputs["attention_mask"], inputs["attention_mask"].shape[1]
    forced = oracle.forced_tokens(3, STEPS)
    where = oracle.positions(t.model, inputs, STEPS)
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method), torch.no_grad():
        expected = oracle.run(t.model, inputs, forced)
        cache = oracle.run(t.model, inputs, forced[:, :0]).cache
        mask = torch.cat([mask, mask.new_ones(3, STEPS)], -1)
        at = where[..., width:]
        out = t.model(input_ids=forced, attention_mask=mask, position_ids=at, **cache_role.given(cache))
    oracle.assert_close(out.logits, expected.decode, "at once")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["random", "fastv", "pyramiddrop", "divprune"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_a_system_prompt_that_was_cached_before(family: str, method: str, implementation: str) -> None:
    """Text is in the cache when the picture comes: the same answer as in one prompt, where the choice is the same."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    width = inputs["input_ids"].shape[1]
    where = oracle.positions(t.model, inputs, STEPS)
    early = 3
    rest = {k: v[:, early:] if k in ("input_ids", "mm_token_type_ids") else v for k, v in inputs.items()}
    rest.pop("attention_mask")
    with matrix.attention(t.model, implementation):
        with matrix.applied(t.model, method) as handle, torch.no_grad():
            with pytest.warns(UserWarning, match="no image"):
                out = t.model(input_ids=inputs["input_ids"][:, :early], position_ids=where[..., :early], use_cache=True)
            out = t.model(**rest, position_ids=where[..., early:width], **cache_role.behind(out))
            repack = matrix.repacks(handle)
            cuts = [oracle.Drop(c.layer, [torch.cat([torch.arange(early), c.kept[0] + early])]) for c in handle.cuts]
            prefill = out.logits
            mask = torch.ones(1, width, dtype=torch.long)
            got = decode(t, cache_role.of_output(out), forced, where[..., width:], mask)
        assert cuts
        expected = oracle.masked_logits(t.model, inputs, cuts, forced, repack=repack)
    oracle.assert_close(prefill[:, -1], expected.prefill[:, -1], "prefill")
    oracle.assert_close(got, expected.decode, "decode")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_cropping_takes_back_what_was_decoded(family: str, method: str) -> None:
    """What assisted decoding does: decode, forget the last tokens, decode others."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    width = inputs["input_ids"].shape[1]
    where = oracle.positions(t.model, inputs, STEPS)[..., width:]
    mask = torch.ones(1, width, dtype=torch.long)
    with matrix.applied(t.model, method):
        expected = oracle.run(t.model, inputs, forced).decode
        cache = oracle.run(t.model, inputs, oracle.forced_tokens(1, 3, seed=11)).cache
        cache.crop(-3)
        assert cache.get_seq_length() == width
        got = decode(t, cache, forced, where, mask)
    oracle.assert_close(got, expected, "after crop")


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_crop_that_is_refused_takes_nothing(family: str) -> None:
    """The layers in front of the cut could be cropped; they are not, where those behind it cannot."""
    t = tiny.load(family)
    with matrix.applied(t.model, "fastv"), torch.no_grad():
        cache = cache_role.of_output(t.model(**t.inputs["image"], use_cache=True))
        before = [layer.keys.shape[2] for layer in cache.layers]
        assert len(set(before)) > 1
        with pytest.raises(squeeze.SqueezeError, match="cannot be undone"):
            cache.crop(-(before[0] - 2))
        assert [layer.keys.shape[2] for layer in cache.layers] == before
        cache.crop(-1)
        assert [layer.keys.shape[2] for layer in cache.layers] == [length - 1 for length in before]


# visionzip renumbers what is left, the other leaves it where it was.
@pytest.mark.parametrize("method", ["fastv", "visionzip"])
@pytest.mark.parametrize("kind", ["none", "open", "closed", "short"])
def test_layers_are_left_alone_in_a_step_that_closes_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    """As generate() passes it: a mask of ones, which closes as little as none; one that closes a word is heeded."""
    t = tiny.load("llava")
    inputs, token = t.inputs["image"], oracle.forced_tokens(1, 1)
    width = inputs["input_ids"].shape[1]
    mask = torch.ones(1, width + 1, dtype=torch.long)
    mask[:, 0] = 0 if kind == "closed" else 1
    # What a mask does not reach is closed.
    mask = mask[:, 1:] if kind == "short" else mask
    where = oracle.positions(t.model, inputs, 1)[..., width:]
    shortened: list[int] = []
    shorten = LayerArguments.shorten

    def counted(self: Any, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        shortened.append(layer)
        return shorten(self, layer, hidden, kwargs)

    with matrix.applied(t.model, method), torch.no_grad():
        open_, cache = (cache_role.of_output(t.model(**inputs, use_cache=True)) for _ in range(2))
        expected = t.model(input_ids=token, **cache_role.given(open_)).logits
        monkeypatch.setattr(LayerArguments, "shorten", counted)
        given = None if kind == "none" else mask
        got = t.model(input_ids=token, attention_mask=given, position_ids=where, **cache_role.given(cache)).logits
    assert bool(shortened) == (kind in ("closed", "short"))
    assert ((got - expected).abs().max() > 1e-4) == (kind in ("closed", "short"))


def stored(cache: Any) -> Any:
    """Return a cache as a file gives it back."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "deepcopy": copy.deepcopy, "torch.save": stored}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", ["fastv", "visionzip", "pyramiddrop"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_copy_of_a_cut_cache_goes_on(family: str, method: str, way: str, kind: str) -> None:
    """A prefill may be kept in a file, and each copy of it answers for itself."""
    t = tiny.load(family)
    inputs = t.inputs["image"]
    width = inputs["input_ids"].shape[1]
    where = oracle.positions(t.model, inputs, STEPS)[..., width:]
    mask = torch.ones(1, width, dtype=torch.long)
    config = t.model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=width + STEPS) if kind == "static" else DynamicCache(config=config)
    with matrix.applied(t.model, method):
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0), cache=cache)
        twin, third = COPIES[way](cache), COPIES[way](cache)
        other = decode(t, twin, oracle.forced_tokens(1, STEPS, seed=11), where, mask)
        forced = oracle.forced_tokens(1, STEPS)
        expected = decode(t, cache, forced, where, mask)
        assert torch.equal(decode(t, third, forced, where, mask), expected)
        assert not torch.equal(other, expected)
        assert int(twin.get_seq_length()) == width + STEPS


class Quantised(DynamicLayer):
    """Stands for layers that keep their entries otherwise, as quantised ones do."""


@pytest.mark.parametrize("method", ["divprune", "fastv", "tome"])
def test_a_cache_that_cannot_be_cut_serves_where_nothing_is(method: str) -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    expected = oracle.run(t.model, inputs, forced)
    settings = {"layer": 2} if method == "fastv" else {}
    with squeeze.applied(t.model, method, ratio=0, **settings) as handle:
        got = oracle.run(t.model, inputs, forced, cache=Cache(layer_class_to_replicate=Quantised))
        assert not handle.cuts
    assert torch.equal(got.prefill, expected.prefill) and torch.equal(got.decode, expected.decode)
    with squeeze.applied(t.model, method, ratio=0.5, **settings):
        with pytest.raises(squeeze.errors.UnsupportedInputError, match="Quantised.*dynamic"):
            oracle.run(t.model, inputs, forced, cache=Cache(layer_class_to_replicate=Quantised))
        again = oracle.run(t.model, inputs, forced)
    assert not torch.equal(again.prefill, expected.prefill)


def test_what_is_no_cache_is_refused() -> None:
    t = tiny.load("llava")
    keys = torch.zeros(1, 2, 3, 8)
    with matrix.applied(t.model, "fastv"), pytest.raises(squeeze.errors.UnsupportedInputError, match="DynamicCache"):
        t.model.model.language_model(input_ids=torch.full((1, 4), 50), **cache_role.given(((keys, keys),) * 4))
