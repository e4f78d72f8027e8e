"""Beside other tools that wrap or hook a model: PEFT, accelerate, other number formats, torch.no_grad and inference."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny

METHODS = matrix.EVERYWHERE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_bfloat16_keeps_the_same_budget(family: str, method: str) -> None:
    t = tiny.load(family)
    half = tiny.fresh(family)
    half.model.to(torch.bfloat16)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    short = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    with matrix.applied(t.model, method) as handle:
        oracle.run(t.model, inputs, forced)
        full = [len(c.kept[0]) for c in handle.cuts]
    with matrix.applied(half.model, method) as handle:
        steps = oracle.run(half.model, short, forced)
        generated = oracle.generate(half.model, short, forced)
        assert [len(c.kept[0]) for c in handle.cuts] == full
        cuts, repack = handle.cuts, matrix.repacks(handle)
    assert steps.prefill.dtype == torch.bfloat16
    assert torch.isfinite(steps.prefill).all()
    assert torch.isfinite(generated).all()
    if not matrix.method(method).merges:
        expected = oracle.masked_logits(half.model, short, cuts, forced, repack=repack)
        assert oracle.gap(steps.decode, expected.decode) < 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_inference_mode(family: str, method: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    with matrix.applied(t.model, method):
        expected = oracle.run(t.model, inputs, forced)
        with torch.inference_mode():
            got = oracle.run(t.model, inputs, forced)
    assert torch.equal(expected.prefill, got.prefill)
    assert torch.equal(expected.decode, got.decode)


def with_lora(t: tiny.TinyModel) -> peft.PeftModel:
    """Return the model inside a PEFT wrapper with adapters that change its answers."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return peft.get_peft_model(t.model, config).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_lora_model(family: str, method: str) -> None:
    t = tiny.fresh(family)
    wrapped = with_lora(t)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 4)
    dense = oracle.run(wrapped, inputs, forced)
    before = snapshot.snapshot(wrapped)
    handle = squeeze.apply(wrapped, method, **matrix.method(method).params)
    with oracle.capture(wrapped, range(4)) as states:
        steps = oracle.run(wrapped, inputs, forced)
    generated = oracle.generate(wrapped, inputs, forced)
    cuts = handle.cuts
    repack = handle.recipe.positions == "repack" and not hasattr(t.model.model, "get_rope_index")
    squeeze.remove(wrapped)
    snapshot.assert_same(before, snapshot.snapshot(wrapped))
    merged = matrix.merged(method, cuts, states)
    expected = oracle.masked_logits(wrapped, inputs, cuts, forced, merged, repack)
    oracle.assert_steps(steps, expected, inputs, cuts, method)
    oracle.assert_close(generated[:, 1:], expected.decode, "generate")
    again = oracle.run(wrapped, inputs, forced)
    assert torch.equal(again.prefill, dense.prefill)
    assert oracle.gap(dense.prefill, steps.prefill) > oracle.TOLERANCE


def test_a_wrapper_and_what_it_wraps_share_one_handle() -> None:
    t = tiny.fresh("llava")
    wrapped = with_lora(t)
    squeeze.apply(wrapped, "fastv", ratio=0.5, layer=2)
    with pytest.raises(squeeze.SqueezeError, match="fastv"):
        squeeze.apply(t.model, "divprune", ratio=0.5)
    squeeze.remove(t.model)


@pytest.mark.parametrize("order", ["hooks first", "squeeze first"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_accelerate_hooks_on_every_layer(family: str, method: str, order: str) -> None:
    """accelerate replaces `forward` of the instances and moves inputs; our hooks run beside it, in either order."""
    t, plain = tiny.fresh(family), tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 4)
    with matrix.applied(plain.model, method) as handle:
        expected = oracle.run(plain.model, inputs, forced)
        cuts = handle.cuts

    def hook() -> None:
        for module in t.model.modules():
            if not list(module.children()):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        for layer in oracle.text_model(t.model).layers:
            add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    if order == "hooks first":
        hook()
    with matrix.applied(t.model, method) as handle:
        if order == "squeeze first":
            hook()
        steps = oracle.run(t.model, inputs, forced)
        assert [c.kept[0].tolist() for c in handle.cuts] == [c.kept[0].tolist() for c in cuts]
    assert torch.equal(steps.prefill, expected.prefill)
    assert torch.equal(steps.decode, expected.decode)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_weights_offloaded_by_accelerate(family: str, method: str) -> None:
    """dispatch_model with pieces whose weights are on the meta device between calls."""
    t, plain = tiny.fresh(family), tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 4)
    with matrix.applied(plain.model, method):
        expected = oracle.run(plain.model, inputs, forced)
    state = {k: v.clone() for k, v in t.model.state_dict().items()}
    accelerate.cpu_offload(t.model, execution_device=torch.device("cpu"), state_dict=state)
    assert any(p.is_meta for p in t.model.parameters())
    before = snapshot.snapshot(t.model)
    handle = squeeze.apply(t.model, method, **matrix.method(method).params)
    steps = oracle.run(t.model, inputs, forced)
    handle.remove()
    assert torch.equal(steps.prefill, expected.prefill)
    assert torch.equal(steps.decode, expected.decode)
    lines = snapshot.differences(before, snapshot.snapshot(t.model))
    # accelerate itself swaps the meta weights at every forward.
    assert not [
        line for line in lines if "_parameters" not in line and "_buffers" not in line and "version" not in line
    ]


def hook_root(model: Any, folder: Path) -> None:
    """Hook the whole model only, as device_map="auto" does on several devices: inputs and outputs are rebuilt."""
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def offload_to_cpu(model: Any, folder: Path) -> None:
    """Keep all weights in a state dict between calls."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=state)


def dispatch_to_disk(model: Any, folder: Path) -> None:
    """Keep the weights of the text model in files."""
    device_map = {"model.language_model": "disk", "": "cpu"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


WRAPS = (pytest.param(hook_root, marks=pytest.mark.quick), offload_to_cpu, dispatch_to_disk)
# Plain; with signals of the encoder, which the features carry; merged in the encoder.
ENCODED = [
    (f, m) for f in ("llava", "qwen2_5_vl") for m in ("divprune", "visionzip", "tome") if matrix.fits(m, f, "image")
]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(("family", "method"), ENCODED)
def test_generate_on_a_model_that_accelerate_hooked(
    family: str, method: str, wrap: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    """generate() encodes the picture first, and what accelerate hands on of it is a copy."""
    t, plain = tiny.fresh(family), tiny.load(family)
    inputs, settings = t.inputs["two_images"], {"max_new_tokens": 5, "return_dict_in_generate": True}
    with matrix.applied(plain.model, method) as handle:
        expected = plain.model.generate(**inputs, **settings, output_logits=True)
        cuts = handle.cuts
    assert cuts
    wrap(t.model, tmp_path)
    with matrix.applied(t.model, method) as handle:
        got = t.model.generate(**inputs, **settings, output_logits=True)
        assert [c.kept[0].tolist() for c in handle.cuts] == [c.kept[0].tolist() for c in cuts]
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(("family", "method"), ENCODED)
def test_features_of_the_caller_on_a_model_that_accelerate_hooked(
    family: str, method: str, wrap: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    t, plain = tiny.fresh(family), tiny.load(family)
    if "mm_encoder_outputs" not in inspect.signature(type(t.model.model).forward).parameters:
        pytest.skip("this release of transformers takes no features in its forward")
    inputs = t.inputs["two_images"]
    pictures = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    words = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with matrix.applied(plain.model, method), torch.no_grad():
        expected = plain.model(**inputs).logits
    wrap(t.model, tmp_path)
    with matrix.applied(t.model, method) as handle, torch.no_grad():
        features = t.model.get_image_features(**pictures, return_dict=True)
        logits = t.model(**words, mm_encoder_outputs={"image": features}).logits
        assert handle.cuts
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_state_dict_is_that_of_the_dense_model(family: str) -> None:
    """A model saved and loaded while a method is applied is the dense one: hooks are no part of the state."""
    t, other = tiny.load(family), tiny.fresh(family)
    with matrix.applied(t.model, "fastv"):
        keys = set(t.model.state_dict())
        other.model.load_state_dict(t.model.state_dict())
    assert keys == set(other.model.state_dict())
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    assert torch.equal(oracle.run(other.model, inputs, forced).prefill, oracle.run(t.model, inputs, forced).prefill)
