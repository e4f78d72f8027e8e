"""Caches of fixed size: each layer has a slot for what it keeps, and compiled decode steps answer as others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import cache_role
import matrix
import oracle
import tiny
from families import proof
from mllm_squeeze import errors

STEPS = 4
ROOM = 3
CELLS = matrix.cells(
    [name for name in matrix.WAYS if not matrix.method(name).decodes],
    matrix.REPRESENTATIVE,
    implementations=("sdpa", "eager"),
)
CELLS += [pytest.param(f, m, "batch", i) for f, m, kind, i in (cell.values for cell in CELLS) if kind == "image"]
# No family of ours, cross-attention of its own (test_cross_cache), and one whose dense model fails (a dict of masks).
NOT_STATIC = (*proof.REFUSED, "mllama", "paligemma2")
# Before 5.24 the library cannot crop a cache of fixed size.
CROPS_STATIC = hasattr(transformers.cache_utils.StaticLayer, "crop")
# Dense models that fail in older releases.
STATIC_BROKEN = ("gemma3_window", "llama4")
COMPILED = [
    pytest.param(family, method, marks=[pytest.mark.quick] if (family, method) == ("llava", "pyramiddrop") else [])
    for family in ("llava", "qwen2_5_vl", "qwen3_vl")
    for method in matrix.CORE
]


def static(t: tiny.TinyModel, tokens: int) -> transformers.StaticCache:
    """Return a cache for this many tokens."""
    return transformers.StaticCache(config=t.model.config.get_text_config(), max_cache_len=tokens)


def windowed(t: tiny.TinyModel) -> bool:
    """Say whether some layer of a static cache of the model holds a window only."""
    return any(type(layer).__name__ == "StaticSlidingWindowLayer" for layer in static(t, 8).layers)


def refused(call: Any, *words: str) -> None:
    """Check that the call raises UnsupportedInputError with these words."""
    with pytest.raises(errors.UnsupportedInputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "method", "kind", "implementation"), CELLS)
def test_a_static_cache_answers_as_a_growing_one(family: str, method: str, kind: str, implementation: str) -> None:
    """Slots are as many as tokens that may come, less those cut at or before the layer."""
    t = tiny.load(family)
    inputs = t.batch().inputs if kind == "batch" else t.inputs[kind]
    batch, width = inputs["input_ids"].shape
    forced = oracle.forced_tokens(batch, STEPS)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method) as handle:
        expected = oracle.run(t.model, inputs, forced)
        cache = static(t, width + STEPS + ROOM)
        got = oracle.run(t.model, inputs, forced, cache=cache)
        cuts = handle.cuts
    oracle.assert_close(got.prefill[real], expected.prefill[real], "prefill")
    oracle.assert_close(got.decode, expected.decode, "decode")
    assert cuts
    for number, layer in enumerate(cache.layers):
        left = [cut.index.shape[1] for cut in cuts if cut.layer <= number]
        assert layer.keys.shape[2] == min(left, default=width) + STEPS + ROOM


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("method", matrix.CORE)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_generate_with_a_static_cache(family: str, method: str, beams: int) -> None:
    t = tiny.load(family)
    inputs = t.batch(matrix.BEAM_BATCH).inputs
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with matrix.applied(t.model, method):
        expected = t.model.generate(**inputs, **settings)
        got = t.model.generate(**inputs, **settings, cache_implementation="static")
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", [name for name in tiny.ALL_FAMILIES if name not in NOT_STATIC])
def test_every_family(family: str) -> None:
    """A family works with a static cache, or has layers with a window and says so."""
    if not matrix.RECENT and family in STATIC_BROKEN:
        pytest.skip(f"transformers {transformers.__version__} itself cannot run {family} with a static cache")
    t = tiny.load(family)
    inputs = t.inputs[next(kind for kind in tiny.kinds(family) if kind != "text")]
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    with matrix.squeeze.applied(t.model, "random", ratio=0.5, seed=3):
        expected = t.model.generate(**inputs, **settings)
        if windowed(t):
            refused(
                lambda: t.model.generate(**inputs, **settings, cache_implementation="static"),
                "StaticSlidingWindowLayer",
                "dynamic",
            )
            return
        got = t.model.generate(**inputs, **settings, cache_implementation="static")
    assert torch.equal(got, expected)


def compiled(t: tiny.TinyModel, inputs: tiny.Inputs, forced: Tensor, config: Any) -> Tensor:
    """Return the logits of generate() whose decode steps run compiled, also without a GPU."""
    config._compile_all_devices = True
    return oracle.generate(t.model, inputs, forced, cache_implementation="static", compile_config=config)


@pytest.mark.parametrize(("family", "method"), COMPILED)
def test_a_compiled_decode_step(family: str, method: str) -> None:
    """It is one graph without a break, which a second prompt of the same size reuses, and it answers alike."""
    t = tiny.load(family)
    first, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    other = {k: v.flip(-1) if k == "pixel_values" else v for k, v in first.items()}
    config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    with torch.no_grad():
        # Leaves hooks of transformers on the layers, which ours must get along with.
        t.model(**first, output_hidden_states=True)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        with matrix.applied(t.model, method):
            for inputs in (first, other):
                expected = oracle.generate(t.model, inputs, forced)
                oracle.assert_close(compiled(t, inputs, forced, config), expected, "compiled")
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        for name in ("_compiled_call", "_last_compile_config"):
            t.model.__dict__.pop(name, None)
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_a_compiled_model(method: str) -> None:
    """torch.compile of the whole model is cut like the model itself; the choice stays outside of its graphs."""
    t = tiny.load("llava")
    inputs = t.inputs["image"]
    torch._dynamo.reset()
    try:
        with matrix.applied(t.model, method) as handle, torch.no_grad():
            expected = t.model(**inputs).logits
            kept = handle.cuts[0].kept[0]
            got = torch.compile(t.model, backend="eager")(**inputs).logits
        oracle.assert_close(got, expected, "compiled")
        assert torch.equal(handle.cuts[0].kept[0], kept)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_static_cache_outlives_its_method(family: str) -> None:
    """Nobody but the method reads a cut static cache; reset, it serves the dense model in full."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    width = inputs["input_ids"].shape[1]
    dense = oracle.run(t.model, inputs, forced)
    cache = static(t, width + STEPS)
    with matrix.applied(t.model, "divprune"):
        oracle.run(t.model, inputs, forced[:, :1], cache=cache)
    refused(lambda: t.model(input_ids=forced[:, :1], **cache_role.given(cache)), "no longer applied")
    cache.reset()
    again = oracle.run(t.model, inputs, forced, cache=cache)
    oracle.assert_close(again.decode, dense.decode, "reset")
    assert {layer.keys.shape[2] for layer in cache.layers} == {width + STEPS}


class Offloaded(transformers.StaticCache):
    """An offloaded cache without the streams of a GPU that it would need."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_an_offloaded_static_cache(method: str) -> None:
    """It serves where nothing is cut."""
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)

    def cache() -> Any:
        made = Offloaded(config=t.model.config.get_text_config(), max_cache_len=128)
        made.offloading = True
        return made

    expected = oracle.run(t.model, inputs, forced, cache=static(t, 128))
    with matrix.squeeze.applied(t.model, method, ratio=0):
        got = oracle.run(t.model, inputs, forced, cache=cache())
    assert torch.equal(got.prefill, expected.prefill) and torch.equal(got.decode, expected.decode)
    with matrix.applied(t.model, method):
        refused(lambda: t.model(**inputs, **cache_role.given(cache())), "offloaded")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop", "visionzip"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_cropping_a_static_cache(family: str, method: str, implementation: str) -> None:
    """Decode, forget, decode others, as assisted decoding does; what was cut is beyond reach, in every layer."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, STEPS)
    width = inputs["input_ids"].shape[1]
    where = oracle.positions(t.model, inputs, STEPS)[..., width:]
    cache = static(t, width + STEPS)
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method):
        expected = oracle.run(t.model, inputs, forced, cache=static(t, width + STEPS)).decode
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 3, seed=11), cache=cache)
        if not CROPS_STATIC:
            refused(lambda: cache.crop(-3), "fixed size", "5.24")
            assert [int(layer.get_seq_length()) for layer in cache.layers] == [width + 3] * len(cache.layers)
            return
        refused(lambda: cache.crop(-width), "cannot be undone")
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [width + 3] * len(cache.layers)
        cache.crop(-3)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [width] * len(cache.layers)
        mask, got = torch.ones(1, width, dtype=torch.long), []
        for n in range(STEPS):
            mask = torch.cat([mask, mask.new_ones(1, 1)], -1)
            given = {"attention_mask": mask, "position_ids": where[..., n : n + 1], **cache_role.given(cache)}
            with torch.no_grad():
                got.append(t.model(input_ids=forced[:, n : n + 1], **given).logits[:, -1])
    assert torch.equal(torch.stack(got, 1), expected)


def test_a_method_that_goes_on_while_decoding() -> None:
    t = tiny.load("qwen2_5_vl")
    inputs = t.inputs["video"]
    with matrix.applied(t.model, "dycoke"):
        refused(lambda: t.model(**inputs, **cache_role.given(static(t, 256))), "dycoke", "dynamic")
