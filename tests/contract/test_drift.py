"""Drift of transformers, simulated: each change is refused by an error that names what broke, or still exact."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils
from transformers.cache_utils import DynamicLayer

import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze.checking import canary
from mllm_squeeze.upstream import cache_contract, caches, versions

Patch = pytest.MonkeyPatch


@pytest.fixture
def model() -> Any:
    return tiny.fresh("llava").model


@pytest.fixture
def untested(monkeypatch: Patch) -> None:
    """A release that nobody tried."""
    monkeypatch.setattr(versions, "installed", lambda: "99.0.0")
    monkeypatch.setattr(canary, "_verdicts", {})


def renamed(monkeypatch: Patch, cls: Any, old: tuple[str, ...], new: str) -> None:
    """Give a forward another name for one of its arguments."""
    forward = cls.forward
    names = inspect.signature(forward).parameters
    before = next(name for name in old if name in names)
    body = ", ".join("**kwargs" if one.kind is one.VAR_KEYWORD else _default(name, one) for name, one in names.items())
    body = body.replace(f"{before}=None", f"{new}=None")
    given = ", ".join(f"{name}={new if name == before else name}" for name in [*names][1:] if name != "kwargs")
    space: dict[str, Any] = {"forward": forward}
    exec(f"def changed({body}):\n    return forward(self, {given}, **kwargs)", space)
    monkeypatch.setattr(cls, "forward", space["changed"])


def _default(name: str, one: Any) -> str:
    return name if one.default is one.empty else f"{name}=None"


CACHE = ("cache", "past_key_values")


@pytest.mark.quick
@pytest.mark.parametrize("part", ["text model", "decoder layer", "attention"])
def test_a_cache_of_a_third_name(model: Any, part: str, monkeypatch: Patch) -> None:
    decoder = oracle.text_model(model)
    parts = {"text model": decoder, "decoder layer": decoder.layers[0], "attention": decoder.layers[0].self_attn}
    renamed(monkeypatch, type(parts[part]), CACHE, "kv_store")
    with pytest.raises(squeeze.SqueezeError, match=rf"{part}.*cache.*kv_store.*{versions.installed()}.*constraints"):
        squeeze.apply(model, "divprune")
    assert not model._forward_pre_hooks


def test_a_cache_of_a_third_name_behind_a_catch_all(model: Any, monkeypatch: Patch) -> None:
    """The forward still names the old one, and its caller hands the cache over under another."""
    decoder = oracle.text_model(model)
    with squeeze.applied(model, "divprune"), torch.no_grad():
        cache = caches.new_growing(decoder.config)
        with pytest.raises(squeeze.SqueezeError, match="cache as 'kv_store'"):
            decoder(inputs_embeds=torch.randn(1, 4, decoder.config.hidden_size), kv_store=cache)


@pytest.mark.quick
def test_renamed_rotary_tables(model: Any, monkeypatch: Patch) -> None:
    renamed(monkeypatch, type(oracle.text_model(model).layers[0]), ("position_embeddings",), "rotary_tables")
    with pytest.raises(squeeze.SqueezeError, match="position_embeddings.*rotary_tables"):
        squeeze.apply(model, "divprune")


def test_a_new_argument_of_a_layer(model: Any, monkeypatch: Patch) -> None:
    """It may bring something for each token, which would not follow a cut."""
    layer = type(oracle.text_model(model).layers[0])
    forward = layer.forward

    def changed(
        self: Any, hidden_states: Any, attention_mask: Any = None, cache: Any = None, token_gates: Any = None, **kw: Any
    ) -> Any:
        return forward(self, hidden_states, attention_mask=attention_mask, **kw)

    monkeypatch.setattr(layer, "forward", changed)
    with pytest.raises(squeeze.SqueezeError, match="nobody has looked at.*token_gates"):
        squeeze.apply(model, "divprune")


@pytest.mark.quick
def test_a_new_mutator_of_a_cache(model: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(DynamicLayer, "evict", lambda self, count: None, raising=False)
    cache_contract.check_caches.cache_clear()
    try:
        with pytest.raises(squeeze.SqueezeError, match="evict"):
            squeeze.apply(model, "divprune")
    finally:
        monkeypatch.undo()
        cache_contract.check_caches.cache_clear()
    squeeze.apply(model, "divprune").remove()


def test_a_registry_of_attention_that_changed(model: Any, monkeypatch: Patch) -> None:
    """Also for methods that read no attention: what masks look like is told by the registry of their makers."""
    monkeypatch.delattr(masking_utils, "sdpa_mask")
    with pytest.raises(squeeze.SqueezeError, match="sdpa_mask"):
        squeeze.apply(model, "divprune")


def test_an_unknown_kind_of_layer(model: Any) -> None:
    oracle.text_model(model).config.layer_types = ["full_attention"] * 3 + ["folded_attention"]
    with pytest.raises(squeeze.SqueezeError, match="folded_attention"):
        squeeze.apply(model, "divprune")


@pytest.mark.parametrize(
    "form",
    [lambda mask: mask[:, 0], lambda mask: mask.long(), lambda mask: {"new": "form"}],
    ids=["3-D", "int", "dict"],
)
def test_a_mask_of_a_new_form(model: Any, form: Callable[[Tensor], Any]) -> None:
    """Layers get a mask that nobody has looked at."""

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        return args, {**kwargs, "attention_mask": form(torch.ones(1, 1, length, length).tril().bool())}

    oracle.text_model(model).layers[0].register_forward_pre_hook(change, with_kwargs=True)
    inputs = tiny.load("llava").inputs["image"]
    with squeeze.applied(model, "divprune"), torch.no_grad(), pytest.raises(squeeze.SqueezeError, match="mask"):
        model(**inputs)


def test_a_copied_output_of_a_feature_method(model: Any, monkeypatch: Patch) -> None:
    """What is recorded about features hangs on what the model's own method gave, copied or not."""
    encode = type(model).get_image_features

    @functools.wraps(encode)
    def copied(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = encode(self, *args, **kwargs)
        return type(found)(**{one.name: getattr(found, one.name) for one in dataclasses.fields(found)})

    inputs, forced = tiny.load("llava").inputs["image"], oracle.forced_tokens(1, 3)
    with squeeze.applied(model, "visionzip", ratio=0.5):
        expected = oracle.generate(model, inputs, forced)
    monkeypatch.setattr(type(model), "get_image_features", copied)
    with squeeze.applied(model, "visionzip", ratio=0.5):
        assert torch.equal(oracle.generate(model, inputs, forced), expected)


def test_an_output_that_is_copied_on_its_way(model: Any) -> None:
    """Between the feature method and the model that scatters features: nothing is known of a copy."""
    t = tiny.load("llava")
    inputs = dict(t.inputs["image"])
    with squeeze.applied(model, "visionzip", ratio=0.5), torch.no_grad():
        found = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        copied = type(found)(**{one.name: getattr(found, one.name) for one in dataclasses.fields(found)})
        with pytest.raises(squeeze.SqueezeError, match="encoded without the handle"):
            model(**inputs, mm_encoder_outputs={"image": copied})


# The canary


def test_an_untested_release_runs_the_canary_once(model: Any, untested: None, monkeypatch: Patch) -> None:
    seen, real = [], canary.broken_ways

    def count(parts: Any) -> list[str]:
        seen.append(parts)
        return real(parts)

    monkeypatch.setattr(canary, "broken_ways", count)
    for _ in range(3):
        squeeze.apply(model, "divprune").remove()
    assert len(seen) == 1
    # Small, with random weights of its own.
    assert seen[0].decoder is not oracle.text_model(model)


def test_a_tested_release_needs_none(model: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: versions.TESTED[-1])
    monkeypatch.setattr(canary, "decoding_of", lambda parts: pytest.fail("ran"))
    squeeze.apply(model, "divprune").remove()


def forgets_positions(monkeypatch: Patch, decoder: Any) -> None:
    """A release that counts positions by itself from what its cache has seen."""
    forward = type(decoder).forward

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(decoder), "forward", changed)


def scales_keys(monkeypatch: Patch, decoder: Any) -> None:
    """A release whose cache changes the keys that it is given, which ours does not."""
    update = DynamicLayer.update

    def changed(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(self, 1.01 * keys, values, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", functools.wraps(update)(changed))


@pytest.mark.parametrize("drift", [forgets_positions, scales_keys])
def test_what_only_decoding_shows(drift: Any, model: Any, untested: None, monkeypatch: Patch) -> None:
    """Names and signatures are as before; a cut, or what it is compared with, is not."""
    drift(monkeypatch, oracle.text_model(model))
    cache_contract.check_caches.cache_clear()
    with pytest.raises(squeeze.SqueezeError, match=r"a cut of a small \w+.*decode steps"):
        squeeze.apply(model, "divprune")
    said = squeeze.check(model, run=True)["self_check"]
    assert said["result"] == "failed" and "decode steps" in said["reason"]


def test_the_switch_goes_on_with_a_warning(model: Any, untested: None, monkeypatch: Patch) -> None:
    forgets_positions(monkeypatch, oracle.text_model(model))
    monkeypatch.setenv(versions.SWITCH, "warn")
    with pytest.warns(squeeze.SqueezeWarning, match="not as the library expects"):
        squeeze.apply(model, "divprune").remove()


def test_no_stand_in_is_said(model: Any, untested: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(canary, "decoding_of", lambda parts: canary.Verdict(why_not="no small text model runs"))
    monkeypatch.setattr("mllm_squeeze.checking.release.decoding_of", canary.decoding_of)
    with pytest.warns(squeeze.SqueezeWarning, match=r"was not tried: no small text model runs.*handle\.using"):
        squeeze.apply(model, "divprune").remove()


def test_a_preview_that_writes_into_the_cache(model: Any, untested: None, monkeypatch: Patch) -> None:
    """What 5.24 did to a preview that took the cache away by its old name."""
    monkeypatch.setattr("mllm_squeeze.upstream.calls.without_cache", dict)
    with pytest.raises(squeeze.SqueezeError, match="preview"):
        squeeze.apply(model, "pyramiddrop")
