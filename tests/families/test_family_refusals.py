"""What cannot be served says so, with the reason, and what the library itself breaks is noticed when it is mended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import cache_role
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import proof

UNIFORM_STEP = {"select": "even_sample", "ratio": 0.5}


def uniform_at(layer: int) -> dict[str, Any]:
    """Return a recipe with one cut."""
    return {"method": "mine", "steps": [{**UNIFORM_STEP, "at": {"layer": layer}}]}


@pytest.mark.quick
@pytest.mark.parametrize("family", proof.families(tuple(proof.REFUSED)))
@pytest.mark.parametrize("method", tuple(proof.PLACES))
def test_a_model_with_nothing_to_cut(family: str, method: str, covers: Any) -> None:
    t = tiny.load(family)
    before = snapshot.snapshot(t.model)
    with pytest.raises(squeeze.SqueezeError, match=proof.REFUSED[family]) as caught:
        squeeze.apply(t.model, method)
    with pytest.raises(squeeze.SqueezeError, match=proof.REFUSED[family]):
        squeeze.check(t.model)
    assert isinstance(caught.value, TypeError)
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    covers(family, "all", refused=str(caught.value))


@pytest.mark.parametrize("method", tuple(proof.PLACES))
@pytest.mark.parametrize("family", proof.families())
def test_a_method_that_does_not_fit_says_why(family: str, method: str, covers: Any) -> None:
    """What `check` says is what `apply` raises, with methods behind it that do fit; what fits is applied."""
    t = tiny.load(family)
    methods = squeeze.check(t.model)["methods"]
    said = methods[method]
    if said == "fits":
        assert proof.fits(family, method)
        squeeze.apply(t.model, method).remove()
        return
    with pytest.raises(squeeze.SqueezeError) as caught:
        squeeze.apply(t.model, method)
    text, _, others = str(caught.value).partition(" Methods that fit this model, the closest first: ")
    assert text == said
    assert all(methods[name] == "fits" for name in others.rstrip(".").split(", ") if others)
    # With its own parameters a method may look at a layer that cannot be read; with those of the tests it fits then.
    assert method in said and (proof.reason(family, method) or "which has none") in said, said
    assert (proof.misfit(family, method) is None) == proof.fits(family, method)
    if not proof.fits(family, method) and f"{method}' reduces" not in said:
        covers(family, proof.PLACES[method], refused=said)


@pytest.mark.quick
@pytest.mark.parametrize(("family", "last"), [("gemma4", 2), ("gemma3n", 2)])
def test_no_cut_behind_the_layers_that_lend_their_keys(family: str, last: int) -> None:
    """Layers 4 and 5 borrow the keys of 2 and 3, so a cut at 3 would leave them with two lengths."""
    if not tiny.available(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    t = tiny.load(family)
    for layer in range(6):
        if layer <= last:
            squeeze.apply(t.model, uniform_at(layer)).remove()
            continue
        with pytest.raises(squeeze.SqueezeError, match=f"borrow keys and values.*at most {last}"):
            squeeze.apply(t.model, uniform_at(layer))


@pytest.mark.quick
@proof.llama4
def test_llama4_refuses_prompts_behind_its_floor() -> None:
    """The temperature of its layers without rope counts entries from `floor_scale` tokens on."""
    t = tiny.load("llama4")
    config = t.model.config.get_text_config()
    inputs, before = t.inputs["image"], config.floor_scale
    assert config.attn_temperature_tuning
    width = inputs["input_ids"].shape[1]
    try:
        with squeeze.applied(t.model, "fastv", ratio=0.5, layer=2):
            config.floor_scale = width + 1
            proof.forward(t, inputs)
            config.floor_scale = width
            with pytest.raises(squeeze.SqueezeError, match=f"scales attention by the place .* from token {width}"):
                proof.forward(t, inputs)
    finally:
        config.floor_scale = before


@pytest.mark.parametrize("family", proof.families(proof.HYBRID))
def test_layers_without_attention_cannot_be_read(family: str) -> None:
    """A cut by attention behind such a layer is refused; one that reads nothing works at every layer."""
    t = tiny.load(family)
    for number in oracle.recurrent(t.model):
        if number + 1 < len(oracle.text_model(t.model).layers):
            with pytest.raises(squeeze.SqueezeError, match=f"attention of layer {number}, which has none"):
                squeeze.apply(t.model, "fastv", ratio=0.5, layer=number + 1)
    kind = tiny.kinds(family)[0]
    for layer in range(1, len(oracle.text_model(t.model).layers)):
        with squeeze.applied(t.model, uniform_at(layer)) as handle:
            prefill = proof.forward(t, t.inputs[kind])
            cuts = handle.cuts
        short = oracle.dropped_logits(t.model, t.inputs[kind], cuts)
        oracle.assert_close(prefill[oracle.survivors(t.inputs[kind], cuts)], short[0], f"layer {layer}")


# What transformers itself refuses or breaks. A test that fails here is good news: serve it, and drop the test.


@pytest.mark.quick
@proof.recent
def test_kimi_k25_breaks_on_chunks_of_several_frames() -> None:
    """Its feature splitter counts t*h*w/4 rows, its tower gives h*w/4."""
    t = tiny.load("kimi_k25")
    inputs = dict(t.inputs["video"])
    grid = inputs["video_grid_thw"].clone()
    assert (grid[:, 0] == 1).all(), "the fixture can show chunks of several frames now"
    frames = inputs["pixel_values_videos"]
    rows = int(grid[0].prod())
    inputs["video_grid_thw"] = torch.cat([grid.new_tensor([[2, *grid[0, 1:].tolist()]]), grid[2:]])
    assert frames.shape[0] >= 2 * rows
    with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
        t.model(**inputs)


@pytest.mark.quick
@proof.recent
def test_paligemma2_refuses_sdpa() -> None:
    t = tiny.load("paligemma2")
    assert oracle.text_model(t.model).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        t.model.set_attn_implementation("sdpa")


@pytest.mark.quick
@proof.recent
def test_phi4_cannot_show_hidden_states_after_an_image() -> None:
    """Its tower's capture is installed first; the text model's then finds none of the states of the tower."""
    t = tiny.fresh("phi4_multimodal")
    picture = t.inputs["image"]
    with torch.no_grad():
        t.model(**picture)
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'size'"):
            t.model(**picture, output_hidden_states=True)
    other = tiny.fresh("phi4_multimodal")
    with torch.no_grad():
        assert len(other.model(**picture, output_hidden_states=True).hidden_states) == 5


@pytest.mark.quick
@proof.recent
@pytest.mark.parametrize("family", proof.OWN_GENERATE)
def test_blip_classes_take_no_cache(family: str, covers: Any) -> None:
    """So there is no second turn, and no decoding by hand."""
    t = tiny.load(family)
    assert cache_role.cache_argument(t.model) is None
    covers(family, "turns", "cache", refused="transformers takes no cache of an earlier turn for this class.")


@pytest.mark.quick
@proof.recent
def test_glm4v_cannot_show_an_image_and_a_video_at_once() -> None:
    """Both carry the image's placeholder, and the model looks for all of them in the features of one."""
    t = tiny.load("glm4v")
    image, video = t.inputs["image"], t.inputs["video"]
    both = {k: torch.cat([image[k], video[k]], -1) for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    both |= {k: v for k, v in (image | video).items() if k not in both}
    with pytest.raises(ValueError, match="do not match"), torch.no_grad():
        t.model(**both)


@pytest.mark.quick
@proof.recent
@proof.llama4
def test_llama4_itself_counts_padding_in_its_temperature() -> None:
    """With a small floor a left-padded row of the dense model differs from its single prompt."""
    t = tiny.load("llama4")
    config = t.model.config.get_text_config()
    batch, before = t.batch(("image", "two_images")), config.floor_scale
    try:
        for module in t.model.modules():
            if hasattr(module, "floor_scale"):
                module.floor_scale = 8
        row = proof.forward(t, batch.inputs)[0, batch.offsets[0] :]
        alone = proof.forward(t, batch.singles[0])[0]
    finally:
        for module in t.model.modules():
            if hasattr(module, "floor_scale"):
                module.floor_scale = before
    assert oracle.gap(row, alone) > 100 * oracle.TOLERANCE
