"""The self-check that `check` runs: on every family, with weights and without, and on models that a cut breaks."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import proof
from mllm_squeeze.checking import canary, trial
from mllm_squeeze.checking.stand_in import stand_in
from mllm_squeeze.engine.hooks import decoder, layers
from mllm_squeeze.engine.hooks import self_check as selfcheck
from mllm_squeeze.engine.sequence.layer_arguments import LayerArguments
from mllm_squeeze.family.structure import find_parts

pytestmark = pytest.mark.quick
# Before 5.23 the text model alone, without a mask, takes the places of a picture for several prompts in one row.
PACKED = () if proof.RECENT else ("cosmos3_edge",)
TRIED = tuple(name for name in (*proof.SERVED, *proof.KEYED) if name not in PACKED)


@pytest.fixture(autouse=True)
def own_verdicts(request: pytest.FixtureRequest) -> None:
    """Keep what a test breaks from the next one: it finds a sound LLaVA, and leaves no verdict of its own."""
    if "monkeypatch" in request.fixturenames:
        canary.decoding_of(find_parts(tiny.load("llava").model))
        request.getfixturevalue("monkeypatch").setattr(canary, "_verdicts", dict(canary._verdicts))


# What cannot be compared with masking, and a word of the reason.
NOT_COMPARABLE = {**dict.fromkeys(proof.HYBRID, "layers without attention"), "mllama": "no part of the text model's"}


def self_check(model: Any) -> dict[str, Any]:
    """Return what the self-check says; it must be plain enough for JSON."""
    said: dict[str, Any] = squeeze.check(model, run=True)["self_check"]
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    return said


def without_weights(model: Any) -> Any:
    """Return the same model on the meta device."""
    with torch.device("meta"):
        return type(model)(model.config)


def assert_said(name: str, said: dict[str, Any]) -> None:
    """A family passes with a small error, or says why it cannot be compared."""
    if name in NOT_COMPARABLE:
        assert said["result"] == "not comparable", said
        assert NOT_COMPARABLE[name] in said["text"] and said["on"] is None
        return
    assert said["result"] == "passed", said
    assert said["error"] < 1e-5 and said["effect"] > 0.05, "the tokens that are masked must matter"
    assert said["text"].startswith("passed: a cut at layer 1 equals masking, error ")


@pytest.mark.parametrize("name", proof.families(TRIED))
def test_every_family(name: str) -> None:
    """With its weights the model itself is cut, and it is left as it was."""
    t = tiny.load(name)
    before = snapshot.snapshot(t.model)
    said = self_check(t.model)
    assert_said(name, said)
    assert said["on"] in (None, "the model itself, float32")
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("name", proof.families(TRIED))
def test_every_family_without_weights(name: str) -> None:
    """Without weights a small text model of the same class is cut, and nothing of it touches the random state."""
    model = without_weights(tiny.load(name).model)
    state = torch.get_rng_state()
    said = self_check(model)
    assert_said(name, said)
    assert torch.equal(torch.get_rng_state(), state)
    if said["on"] is not None:
        assert "text model alone" in said["on"] and "random weights" in said["on"]
        assert f"of {len(oracle.text_model(model).layers)} layers" in said["on"]


def mixing(forward: Any) -> Any:
    """Let the layers of a class add to each token the one in front of it, as no mask could forbid."""

    def mixed(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states + 0.1 * hidden_states.roll(1, dims=1), *args, **kwargs)

    return mixed


@pytest.mark.parametrize("empty", [False, True])
def test_layers_that_mix_tokens_fail(monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    model = tiny.load("llava").model
    monkeypatch.setattr(LlamaDecoderLayer, "forward", mixing(LlamaDecoderLayer.forward))
    said = self_check(without_weights(model) if empty else model)
    assert said["result"] == "failed"
    assert "differs from masking" in said["reason"]
    assert said["error"] > 0.01


# What a family brings to its text model besides embeddings, and how the engine could forget to cut it.
FORGOTTEN = {
    "qwen3_vl": (decoder, "has_deepstack", lambda decoder: False),
    "granite4_vision": (decoder, "take_inner_features", lambda kwargs: (kwargs, None)),
    "gemma3n": (layers, "unfold", lambda hidden, like: like),
}


@pytest.mark.parametrize("name", proof.families(tuple(FORGOTTEN)))
def test_what_a_picture_brings_along_is_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that forgets deepstack features, inner features or streams fails, with weights and without."""
    monkeypatch.setattr(*FORGOTTEN[name])
    model = tiny.load(name).model
    for said in (self_check(model), self_check(without_weights(model))):
        assert said["result"] == "failed", said


def test_a_cut_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that knows how long the prompt is: the text model runs, its cut does not, and that is said."""
    model = tiny.load("llava").model
    forward = LlamaDecoderLayer.forward

    def stubborn(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states + torch.zeros(28, 1), *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", stubborn)
    before = snapshot.snapshot(model)
    said = self_check(model)
    assert said["result"] == "failed"
    assert "a cut at layer 1 raises: RuntimeError" in said["reason"]
    snapshot.assert_same(before, snapshot.snapshot(model))


def test_nan_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.load("llava").model
    forward = LlamaDecoderLayer.forward

    def broken(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, *args, **kwargs) * (1 if hidden_states.shape[1] == 28 else torch.nan)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", broken)
    said = self_check(model)
    assert said["result"] == "failed" and said["error"] is None
    assert "gives nan" in said["reason"]


def test_what_does_not_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text model that cannot be built small, or does not run alone: a reason, and no error."""
    model = tiny.load("llava").model

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("not without a picture\nand more")

    empty = without_weights(model)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", refuse)
    for said in (self_check(model), self_check(empty)):
        assert said["result"] == "not run"
        assert "ValueError: not without a picture" in said["reason"] and "more" not in said["reason"]


def test_tokens_that_do_not_matter_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody looks at a token, that a cut equals masking says nothing about cuts."""
    model = tiny.load("llava").model
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states, *_, **__: hidden_states)
    said = self_check(model)
    assert said["result"] == "not comparable"
    assert "too close to tell" in said["reason"]


def test_a_model_in_training_is_not_run() -> None:
    t = tiny.fresh("llava")
    assert "model.eval()" in self_check(t.model.train())["reason"]


def test_a_squeezed_model_is_not_tried() -> None:
    t = tiny.load("llava")
    with squeeze.applied(t.model, "fastv"), pytest.raises(squeeze.SqueezeError, match="squeeze.remove"):
        squeeze.check(t.model, run=True)
    assert "self_check" not in squeeze.check(t.model)


def test_half_precision_is_judged_by_its_own_rounding() -> None:
    said = self_check(tiny.fresh("llava").model.to(torch.bfloat16))
    assert said["result"] == "passed", said
    assert said["on"] == "the model itself, bfloat16"
    # Processors differ in how they round: on some the two are equal to the bit.
    assert said["error"] < 5e-2


def rounded(model: Any) -> Any:
    """Return a model whose text model rounds weights and activations to 8 bits, by the largest in each tensor."""
    text = oracle.text_model(model)
    with warnings.catch_warnings():
        # torch means to move it to another package.
        warnings.simplefilter("ignore")
        text.layers = torch.ao.quantization.quantize_dynamic(text.layers, {torch.nn.Linear}, dtype=torch.qint8)
    return model


def test_rounding_of_quantised_models_is_told_from_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are scaled by what runs beside them, so a cut changes them by more than float32 would explain."""
    said = self_check(rounded(tiny.fresh("llava").model))
    assert 1e-3 < said["error"] < 5e-2
    assert said["result"] == "passed" and said["decoding"] == "exact", said
    monkeypatch.setattr(selfcheck, "is_quantised", lambda model: False)
    assert self_check(rounded(tiny.fresh("llava").model))["result"] == "failed"


def test_a_fault_of_a_quantised_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that rotates its survivors wrongly: small in a model that rounds, and far above its rounding."""
    placed = LayerArguments._placed

    def wrong(self: Any, layer: int, hidden: Any, call: Any, entries: Any) -> Any:
        rope = tuple(table[:, : hidden.shape[1]] for table in call.rope)
        return placed(self, layer, hidden, call, entries).replace(rope=rope)

    monkeypatch.setattr(LayerArguments, "_placed", wrong)
    monkeypatch.setattr(trial, "decoding_of", lambda parts: canary.Verdict())
    said = self_check(rounded(tiny.fresh("llava").model))
    assert said["result"] == "failed", said


def empty(name: str, config: str, **changes: Any) -> Any:
    """Return a text model of the size that its config class has by default, on the meta device."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**changes))


def test_three_axes_that_only_the_inner_model_tells() -> None:
    """The default config names no sections, and the small text model stands alone."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.Qwen2_5_VLConfig())
    said = self_check(model)
    assert said["result"] == "not run" or (said["result"], said["decoding"]) == ("passed", "exact"), said
    assert said["result"] == "passed" or not matrix.RECENT, said


# Class, config, layers that are left and how many of them borrow keys, hidden size that is left.
REAL = [
    ("LlamaModel", "LlamaConfig", 3, 0, 256),
    ("Qwen3Model", "Qwen3Config", 3, 0, 256),
    ("Gemma3TextModel", "Gemma3TextConfig", 6, 0, 1024),
    ("Gemma3nTextModel", "Gemma3nTextConfig", 10, 5, 1024),
    ("Llama4TextModel", "Llama4TextConfig", 4, 0, 512),
    ("DeepseekV3Model", "DeepseekV3Config", 3, 0, 128),
    ("OPTModel", "OPTConfig", 3, 0, 128),
]


@pytest.mark.parametrize(("model", "config", "layers", "borrowing", "width"), REAL, ids=[row[0] for row in REAL])
def test_what_is_kept_of_a_model_of_real_size(model: str, config: str, layers: int, borrowing: int, width: int) -> None:
    """Few layers of every kind, few heads, few words; it runs, and is small."""
    decoder = empty(model, config)
    small = stand_in(decoder, narrow=True)
    got, was = small.decoder.config, decoder.config
    assert (got.num_hidden_layers, got.hidden_size) == (layers, width)
    assert getattr(got, "num_kv_shared_layers", 0) == borrowing
    kinds = getattr(was, "layer_types", None)
    if kinds:
        assert set(got.layer_types[1:]) == set(kinds), "every kind stands behind the cut"
        assert len(got.layer_types) == layers
    assert sum(weight.numel() for weight in small.decoder.parameters()) < 2e8
    assert f"{layers} of {was.num_hidden_layers} layers" in small.shrunk
    assert f"hidden size {width} of {was.hidden_size}" in small.shrunk
    with torch.no_grad():
        assert small.decoder(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


def test_layers_named_by_number_are_followed() -> None:
    """Layer numbers and lists with an entry per layer go along with the layers that are kept."""
    types = ["full_attention"] * 6 + ["sliding_attention"] * 2
    changes = dict(num_hidden_layers=8, layer_types=types, mlp_only_layers=[0, 7])
    small = stand_in(empty("Qwen3MoeModel", "Qwen3MoeConfig", **changes), narrow=True).decoder.config
    # The last layer alone is both sliding and without experts.
    assert small.num_hidden_layers == 8
    assert small.mlp_only_layers == [0, 7] and small.layer_types == types
    changes |= dict(mlp_only_layers=[0, 2])
    small = stand_in(empty("Qwen3MoeModel", "Qwen3MoeConfig", **changes), narrow=True).decoder.config
    assert small.num_hidden_layers == 7
    assert small.mlp_only_layers == [0, 2] and small.layer_types == types[:7]
    changes |= dict(mlp_only_layers=[0, 2, 3, 6], layer_types=["full_attention", "sliding_attention"] * 4)
    small = stand_in(empty("Qwen3MoeModel", "Qwen3MoeConfig", **changes), narrow=True).decoder.config
    assert small.num_hidden_layers == 5
    assert small.mlp_only_layers == [0, 2, 3], "layer 6 is gone"


def test_a_model_that_stays_too_large_is_not_built() -> None:
    """At full width three layers of a 70B model take 8 GiB and more; nothing is allocated to find that out."""
    decoder = empty("LlamaModel", "LlamaConfig", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    with pytest.raises(squeeze.SqueezeError, match=r"takes \d+\.\d GiB in float32"):
        stand_in(decoder, narrow=False)
    assert stand_in(decoder, narrow=True).decoder.config.hidden_size < 1024
