"""Every error says what was given, what is allowed and what to do, has the promised type, and changes nothing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from mllm_squeeze import errors, registry


def uniform_at(layer: Any) -> dict[str, Any]:
    """Return a recipe with one cut."""
    steps = [{"select": "even_sample", "at": {"layer": layer}, "ratio": 0.5}]
    return {"method": "mine", "steps": steps}


# What is asked, the error's type and the built-in it also is, words that its message must hold.
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type, type, tuple[str, ...]]] = {
    "method": (("fastvv",), {}, errors.UnknownNameError, KeyError, ("fastvv", "Did you mean 'fastv'")),
    "file": (("nowhere/mine.yaml",), {}, errors.SqueezeError, Exception, ("nowhere/mine.yaml",)),
    "parameter": (("fastv",), {"ration": 0.5}, errors.ConfigError, ValueError, ("ration", "ratio")),
    "ratio one": (("fastv",), {"ratio": 1.0}, errors.ConfigError, ValueError, ("ratio", "1")),
    "ratio negative": (("fastv",), {"ratio": -0.1}, errors.ConfigError, ValueError, ("ratio", "-0.1")),
    "ratio above": (("fastv",), {"ratio": 50}, errors.ConfigError, ValueError, ("ratio", "50")),
    "ratio word": (("fastv",), {"ratio": "half"}, errors.ConfigError, ValueError, ("ratio", "half")),
    "ratio and keep": (("fastv",), {"ratio": 0.5, "keep": 64}, errors.ConfigError, ValueError, ("ratio", "keep")),
    "keep zero": (("fastv",), {"keep": 0}, errors.ConfigError, ValueError, ("keep", "0")),
    "keep above one": (("fastv",), {"keep": 1.5}, errors.ConfigError, ValueError, ("keep", "1.5")),
    "ratio none": (("fastv",), {"ratio": None}, errors.ConfigError, ValueError, ("ratio=None", "leave ratio out")),
    "ratio tensor": (
        ("fastv",),
        {"ratio": torch.tensor(0.5)},
        errors.ConfigError,
        ValueError,
        ("ratio is tensor(0.5000)", "item()"),
    ),
    "ratio quoted": (("fastv",), {"ratio": "0.5"}, errors.ConfigError, ValueError, ("ratio", "'0.5'")),
    "ratio true": (("fastv",), {"ratio": True}, errors.ConfigError, ValueError, ("ratio", "True")),
    "ratio nan": (("fastv",), {"ratio": float("nan")}, errors.ConfigError, ValueError, ("ratio", "nan")),
    "seed": (("random",), {"seed": 2**80}, errors.ConfigError, ValueError, ("seed", "-2**63", "2**64 - 1", str(2**80))),
    "no budget": (
        ({"method": "mine", "steps": [{"select": "even_sample", "at": "projector"}]},),
        {},
        errors.ConfigError,
        ValueError,
        ("mine", "step 1", "no budget", "ratio", "keep"),
    ),
    "layer above": (
        ("fastv",),
        {"layer": 4},
        errors.ConfigError,
        ValueError,
        ("'fastv', step 1", "0 to 3", "4"),
    ),
    "layer negative": (("fastv",), {"layer": -1}, errors.ConfigError, ValueError, ("layer", "-1")),
    "layer without attention": (("fastv",), {"layer": 0}, errors.ConfigError, ValueError, ("layer", "1")),
    "layers not ascending": (("pyramiddrop",), {"layers": [3, 1]}, errors.ConfigError, ValueError, ("3", "1")),
    "recipe without steps": (({"method": "mine"},), {}, errors.ConfigError, ValueError, ("steps",)),
    "recipe layer": ((uniform_at(17),), {}, errors.ConfigError, ValueError, ("17", "3")),
    "recipe reducer": (
        ({"method": "mine", "steps": [{"reducer": "temporal_window", "at": "projector"}]},),
        {},
        errors.UnknownNameError,
        KeyError,
        ("temporal_window'", "Did you mean 'temporal_windows'"),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(name: str) -> None:
    arguments, params, kind, builtin, words = WRONG[name]
    t = tiny.load("llava")
    before = snapshot.snapshot(t.model)
    with pytest.raises(kind) as caught:
        squeeze.apply(t.model, *arguments, **params)
    assert isinstance(caught.value, squeeze.SqueezeError) and isinstance(caught.value, builtin)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.quick
def test_a_text_model() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    before = snapshot.snapshot(model)
    with pytest.raises(errors.UnsupportedModelError, match="llama") as caught:
        squeeze.apply(model, "fastv", ratio=0.5)
    assert isinstance(caught.value, TypeError)
    assert "LlamaForCausalLM" in str(caught.value)
    snapshot.assert_same(before, snapshot.snapshot(model))


@pytest.mark.quick
@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "llava", None])
def test_no_model_at_all(thing: Any) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=type(thing).__name__):
        squeeze.apply(thing, "fastv", ratio=0.5)


@pytest.mark.quick
def test_arguments_swapped() -> None:
    t = tiny.load("llava")
    for call in (squeeze.apply, lambda *a, **k: squeeze.applied(*a, **k).__enter__()):
        with pytest.raises(errors.UnsupportedModelError, match=r"squeeze\.apply\(model, 'fastv'\)") as caught:
            call("fastv", t.model, ratio=0.5)
        assert "LlavaForConditionalGeneration" in str(caught.value)
        assert len(str(caught.value)) < 300


@pytest.mark.quick
def test_a_method_that_is_no_method_is_named_in_short() -> None:
    """The repr of a module has a line per layer."""
    t = tiny.load("llava")
    with pytest.raises(errors.ConfigError, match="a YAML file or a dict; got a LlavaModel.") as caught:
        squeeze.apply(t.model, t.model.model)
    assert len(str(caught.value)) < 300


@pytest.mark.quick
def test_check_reports_a_broken_method_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that brings a method may break at any time; the others are checked all the same."""
    broken: dict[str, Any] = {
        "unread": {"method": "unread"},
        "unknown": {"method": "unknown", "steps": [{"reducer": "rnk", "at": "projector", "ratio": 0.5}]},
        "gone": "nowhere/gone.yaml",
    }
    monkeypatch.setattr(registry, "_own_methods", broken)
    found = squeeze.check(tiny.load("llava").model)["methods"]
    assert "steps is a list" in found["unread"]
    assert "Unknown reducer 'rnk'" in found["unknown"]
    assert "there is no such recipe file" in found["gone"]
    assert found["fastv"] == "fits"


@pytest.mark.quick
@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, -(2**63)])
def test_every_seed_that_is_promised_works(seed: int) -> None:
    t = tiny.load("llava")
    with matrix.applied(t.model, "random", ratio=0.5, seed=seed) as handle:
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1))
        assert len(handle.cuts) == 1


@pytest.mark.quick
def test_twice() -> None:
    t = tiny.load("llava")
    with matrix.applied(t.model, "fastv"):
        before = snapshot.snapshot(t.model)
        with pytest.raises(errors.AlreadyAppliedError, match="fastv.*remove") as caught:
            squeeze.apply(t.model, "divprune", ratio=0.5)
        assert isinstance(caught.value, RuntimeError)
        snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.quick
def test_removing_what_is_not_there() -> None:
    t = tiny.load("llava")
    with pytest.raises(errors.NotAppliedError, match="apply"):
        squeeze.remove(t.model)
    handle = squeeze.apply(t.model, "fastv", ratio=0.5, layer=2)
    handle.remove()
    with pytest.raises(errors.NotAppliedError, match="removed"):
        handle.remove()


@pytest.mark.parametrize(
    ("family", "method", "kind", "implementation"),
    matrix.misfits(("image", "video", "two_images", "image_video")),
)
def test_what_does_not_fit_is_said(family: str, method: str, kind: str, implementation: str) -> None:
    """A method that cannot work on a model raises at apply; one that finds nothing to do in a prompt warns."""
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, 2)
    before = snapshot.snapshot(t.model)
    verdict = squeeze.check(t.model)["methods"][method]
    if matrix.misfit(method, family):
        with pytest.raises(errors.UnsupportedModelError, match=method) as caught:
            squeeze.apply(t.model, method, **matrix.method(method).params)
        assert "Use" in str(caught.value)
        assert family in str(caught.value)
        assert verdict != "fits"
    else:
        assert verdict == "fits"
        dense = oracle.run(t.model, inputs, forced)
        with matrix.applied(t.model, method) as handle:
            with pytest.warns(squeeze.SqueezeWarning, match=method):
                squeezed = oracle.run(t.model, inputs, forced)
            if "video" not in kind or "image" not in kind:
                assert handle.cuts == ()
                assert torch.equal(squeezed.prefill, dense.prefill)
                assert torch.equal(squeezed.decode, dense.decode)
    snapshot.assert_same(before, snapshot.snapshot(t.model))


def refused(call: Callable[[], Any], *words: str) -> None:
    """Check that the call raises UnsupportedInputError with these words."""
    with pytest.raises(errors.UnsupportedInputError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("method", matrix.CORE)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_prefill_in_chunks(family: str, method: str) -> None:
    t = tiny.load(family)
    with matrix.applied(t.model, method):
        refused(
            lambda: t.model.generate(**t.inputs["image"], max_new_tokens=2, prefill_chunk_size=8), "prefill_chunk_size"
        )
        # The next call is none the worse for it.
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1))


@pytest.mark.quick
def test_features_encoded_before_apply() -> None:
    """Pre-encoded features without what the handle recorded are refused, not taken for a prompt without a picture."""
    t = tiny.load("llava")
    inputs = t.inputs["image"]
    with torch.no_grad():
        features = t.model.model.get_image_features(pixel_values=inputs["pixel_values"])
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with matrix.applied(t.model, "fastv"):
        refused(lambda: t.model(**text, mm_encoder_outputs={"image": features}), "apply")


@pytest.mark.quick
@pytest.mark.parametrize(("before", "after"), [("divprune", "visionzip"), ("tome", "divprune"), ("divprune", "tome")])
def test_features_encoded_under_another_method(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    """They hold other signals, or merged tokens; taken for ours they would be cut by nothing, or twice."""
    t = tiny.load("llava")
    inputs, inner = t.inputs["image"], type(t.model.model)
    with matrix.applied(t.model, before), torch.no_grad():
        features = t.model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    # As a cache of features does it, and as generate() hands them on in newer releases of transformers.
    calls = [inputs]
    if "mm_encoder_outputs" in inspect.signature(inner.forward).parameters:
        text = {k: v for k, v in inputs.items() if k != "pixel_values"}
        calls.append({**text, "mm_encoder_outputs": {"image": features}})
    monkeypatch.setattr(inner, "get_image_features", lambda *args, **kwargs: features)
    with matrix.applied(t.model, after):
        for given in calls:
            refused(lambda given=given: t.model(**given), "another method", "anew")


@pytest.mark.quick
def test_a_prompt_without_pictures_warns_at_each_prefill() -> None:
    t = tiny.load("llava")
    with matrix.applied(t.model, "fastv"):
        for _ in range(2):
            with pytest.warns(squeeze.SqueezeWarning, match="no image"):
                oracle.run(t.model, t.inputs["text"], oracle.forced_tokens(1, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            oracle.generate(t.model, t.inputs["image"], oracle.forced_tokens(1, 3))


@pytest.mark.quick
@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_more_asked_than_there_is(method: str) -> None:
    """Everything is kept, and a warning says so once per prompt, not once per token."""
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    dense = oracle.run(t.model, inputs, forced)
    with matrix.applied(t.model, method, keep=99), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        squeezed = oracle.run(t.model, inputs, forced)
    texts = [str(w.message) for w in caught if issubclass(w.category, squeeze.SqueezeWarning)]
    assert len(texts) == 1
    assert "99" in texts[0]
    assert "25" in texts[0]
    assert torch.equal(dense.prefill, squeezed.prefill)
    assert torch.equal(dense.decode, squeezed.decode)


@pytest.mark.quick
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_check_names_every_method(family: str) -> None:
    t = tiny.load(family)
    found = squeeze.check(t.model)
    assert found["family"] == t.model.config.model_type
    assert found["layers"] == 4
    assert found["tower"] == t.family.tower
    assert set(found["methods"]) == set(squeeze.methods()) >= set(matrix.ALL)
    fit = {m for m, verdict in found["methods"].items() if verdict == "fits"}
    ready = [name for name in matrix.ALL if not matrix.method(name).wants_text_encoder]
    expected = {name for name in ready if matrix.misfit(name, family) is None}
    assert fit & set(matrix.ALL) <= expected
    # With the depths of their papers some want more layers than there are.
    for name in expected - fit:
        assert "layer" in found["methods"][name], name
    assert len(expected - fit) < 6
    for name in set(matrix.ALL) - set(ready):
        said = found["methods"][name]
        assert any(word in said for word in ("text_encoder=", "text encoder", "CLS", "reduces video")), name
