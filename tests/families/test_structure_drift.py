"""A release that renames a module, an argument or a word of a config: refused by what it broke, or still exact."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import proof
from mllm_squeeze.family.structure import find_parts
from mllm_squeeze.family.table import TABLE
from mllm_squeeze.upstream import modules
from mllm_squeeze.upstream.configs import placeholder_names

pytestmark = pytest.mark.quick

Patch = pytest.MonkeyPatch
SHOWN = "not as the library expects"


def rename_child(module: nn.Module, old: str, new: str) -> None:
    """Give a submodule another name."""
    module._modules[new] = module._modules.pop(old)


def rename_weight(module: nn.Module, old: str, new: str) -> None:
    """Give a weight another name."""
    module._parameters[new] = module._parameters.pop(old)


def rename_argument(patch: Patch, owner: type, method: str, old: str, new: str) -> None:
    """Give an argument of a method another name, as `inspect` sees it."""
    original = getattr(owner, method)
    shown = inspect.signature(original)

    def renamed(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    names = [p.replace(name=new) if name == old else p for name, p in shown.parameters.items()]
    assert old in shown.parameters
    renamed.__signature__ = shown.replace(parameters=names)  # type: ignore[attr-defined]
    patch.setattr(owner, method, renamed)


def drop_word(patch: Patch, config: Any, word: str) -> None:
    """Take a word out of a config and its class."""
    config.__dict__.pop(word, None)
    for kind in type(config).__mro__:
        if word in vars(kind):
            patch.delattr(kind, word)
    patch.setattr(type(config), "attribute_map", {k: v for k, v in config.attribute_map.items() if k != word})
    assert not hasattr(config, word)


def drop_method(patch: Patch, module: nn.Module, name: str) -> None:
    """Take a method out of a module's class."""
    owner = next(kind for kind in type(module).__mro__ if name in vars(kind))
    patch.delattr(owner, name)
    assert not hasattr(module, name)


# Each one renames something, and the message names what is in the pattern.


def rotary(patch: Patch, t: tiny.TinyModel) -> None:
    rename_child(oracle.text_model(t.model), "rotary_emb", "rope_tables")


def rotary_kind(patch: Patch, t: tiny.TinyModel) -> None:
    kind = type(oracle.text_model(t.model).rotary_emb)
    rename_argument(patch, kind, "forward", "layer_type", "attention_kind")


def attention(patch: Patch, t: tiny.TinyModel) -> None:
    for layer in oracle.text_model(t.model).layers:
        rename_child(layer, "self_attn", "mixer")


def causal(patch: Patch, t: tiny.TinyModel) -> None:
    for layer in oracle.text_model(t.model).layers:
        del layer.self_attn.is_causal


def cross_argument(patch: Patch, t: tiny.TinyModel) -> None:
    kind = type(oracle.text_model(t.model))
    rename_argument(patch, kind, "forward", "cross_attention_states", "vision_states")


def cross_module(patch: Patch, t: tiny.TinyModel) -> None:
    text = oracle.text_model(t.model)
    for layer in text.layers:
        if "cross_attn" in layer._modules:
            rename_child(layer, "cross_attn", "picture_attn")
    text.config.cross_attention_layers = []


def deepstack_method(patch: Patch, t: tiny.TinyModel) -> None:
    drop_method(patch, oracle.text_model(t.model), "_deepstack_process")


def deepstack_arguments(patch: Patch, t: tiny.TinyModel) -> None:
    rename_argument(patch, type(oracle.text_model(t.model)), "_deepstack_process", "visual_embeds", "features")


def deepstack_input(patch: Patch, t: tiny.TinyModel) -> None:
    kind = type(oracle.text_model(t.model))
    drop_method(patch, oracle.text_model(t.model), "_deepstack_process")
    rename_argument(patch, kind, "forward", "visual_pos_masks", "visual_places")
    rename_argument(patch, kind, "forward", "deepstack_visual_embeds", "deepstack_states")


def inner_mask(patch: Patch, t: tiny.TinyModel) -> None:
    rename_argument(patch, type(oracle.text_model(t.model)), "forward", "vision_mask", "picture_mask")


def borrowed(patch: Patch, t: tiny.TinyModel) -> None:
    oracle.text_model(t.model).config.num_kv_shared_layers = 0


def temperature(patch: Patch, t: tiny.TinyModel) -> None:
    drop_word(patch, oracle.text_model(t.model).config, "floor_scale")


def class_token(patch: Patch, t: tiny.TinyModel) -> None:
    tower = find_parts(t.model).tower
    assert tower is not None
    owner, name = next((m, n) for m in tower.modules() for n in m._parameters if n in ("class_embedding", "cls_token"))
    rename_weight(owner, name, "lead")


def feature_method(patch: Patch, t: tiny.TinyModel) -> None:
    drop_method(patch, t.model.base_model, "get_image_features")


def placeholder(patch: Patch, t: tiny.TinyModel) -> None:
    for word in placeholder_names("video"):
        if hasattr(t.model.config, word):
            drop_word(patch, t.model.config, word)


def feature_layer(patch: Patch, t: tiny.TinyModel) -> None:
    drop_word(patch, t.model.config, "vision_feature_layer")


def tile_count(patch: Patch, t: tiny.TinyModel) -> None:
    patch.delattr(inspect.getmodule(type(t.model.base_model)), "image_size_to_num_patches")


def tile_pack(patch: Patch, t: tiny.TinyModel) -> None:
    rename_argument(patch, type(t.model.base_model), "pack_image_features", "image_newline", "separator")


RENAMES: list[tuple[Callable[[Patch, tiny.TinyModel], None], str, str]] = [
    (rotary, "llava", r"rotary embedding of LlamaModel.*`rotary_emb`"),
    (rotary_kind, "gemma3", r"rotary tables of Gemma3TextModel.*`layer_type`"),
    (attention, "llava", r"attention of layer 0 \(LlamaDecoderLayer, 'full_attention'\).*mixer"),
    (causal, "llava", r"LlamaAttention\.is_causal"),
    (cross_argument, "mllama", r"`cross_attention_states`"),
    (cross_module, "mllama", r"`cross_attn`"),
    (deepstack_method, "qwen3_vl", r"method `_deepstack_process`"),
    (deepstack_arguments, "qwen3_vl", r"_deepstack_process.*visual_embeds.*features"),
    (deepstack_input, "qwen3_vl", r"visual_places, deepstack_states"),
    (inner_mask, "granite4_vision", r"`vision_mask` and `deepstack_features`"),
    (borrowed, "gemma4", r"layers that borrow keys.*\[\] and \[4, 5\]"),
    (borrowed, "gemma3n", r"layers that borrow keys.*\[\] and \[4, 5\]"),
    (temperature, "llama4", r"attention temperature.*no floor_scale"),
    (class_token, "llava", r"CLS token of .*26 positions for 25 patches, found none"),
    (class_token, "internvl", r"CLS token of .*65 positions for 64 patches, found none"),
    (feature_method, "llava", r"LlavaModel encodes images.*`get_image_features`"),
    (feature_method, "qwen2_vl", r"encodes images.*found get_video_features"),
    (placeholder, "llava_next_video", r"placeholder of video.*`video_token_id` or `video_token_index`"),
    (feature_layer, "llava", r"`vision_feature_layer` in the config"),
    (tile_count, "llava_next", r"modeling_llava_next\.image_size_to_num_patches.*pinpoints"),
    (tile_pack, "llava_onevision", r"LlavaOnevisionModel\.pack_image_features.*without image_newline"),
]


@pytest.mark.parametrize(
    ("rename", "family", "pattern"), [pytest.param(*r, id=f"{r[0].__name__}-{r[1]}") for r in RENAMES]
)
def test_what_was_renamed_is_refused(rename: Any, family: str, pattern: str, monkeypatch: Patch) -> None:
    t = tiny.fresh(family)
    find_parts(t.model)
    rename(monkeypatch, t)
    before = snapshot.snapshot(t.model)
    with pytest.raises(squeeze.SqueezeError) as caught:
        squeeze.apply(t.model, "divprune", ratio=0.5)
    said = str(caught.value)
    assert SHOWN in said
    assert re.search(pattern, said), said
    snapshot.assert_same(before, snapshot.snapshot(t.model))


def test_three_axes_have_a_second_witness(monkeypatch: Patch) -> None:
    """Under another name in the config, or without the method that makes them: positions are kept all the same."""
    t = tiny.fresh("qwen2_vl")
    monkeypatch.delattr(type(find_parts(t.model).base), "get_rope_index")
    assert find_parts(t.model).mrope
    monkeypatch.undo()
    rope = oracle.text_model(t.model).config.rope_parameters
    rope["axes"] = rope.pop("mrope_section")
    assert find_parts(t.model).mrope
    assert not find_parts(tiny.load("llava").model).mrope


@pytest.mark.parametrize("gone", ["function", "word"])
def test_an_encoder_with_windows_is_never_taken_for_one_without(gone: str, monkeypatch: Patch) -> None:
    t = tiny.fresh("qwen2_5_vl")
    tower = find_parts(t.model).tower
    if gone == "function":
        monkeypatch.delattr(inspect.getmodule(type(tower)), "get_vision_window_index")
        pattern = r"modeling_qwen2_5_vl\.get_vision_window_index` should be a function, found none"
    else:
        drop_word(monkeypatch, tower.config, "fullatt_block_indexes")
        pattern = r"expected a list `fullatt_block_indexes`, found none"
    before = snapshot.snapshot(t.model)
    with pytest.raises(squeeze.SqueezeError, match=pattern):
        squeeze.apply(t.model, "visionzip", ratio=0.5)
    assert re.search(pattern, squeeze.check(t.model)["methods"]["visionzip"])
    # What does not read the encoder needs neither.
    squeeze.apply(t.model, "divprune", ratio=0.5).remove()
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("family", proof.families())
def test_nothing_is_broken_on_this_release(family: str) -> None:
    parts = find_parts(tiny.load(family).model)
    assert parts.special_tokens in (0, 1)
    if parts.tower is not None:
        assert modules.patch_places(parts.tower, parts.blocks)[0] == modules.has_class_token(parts.tower)


def test_a_family_nobody_tried_may_name_its_parts_as_it_likes(monkeypatch: Patch) -> None:
    """Its first call proves the cut; so other names of its attention are no reason to refuse it."""
    t = tiny.fresh("llava")
    attention(monkeypatch, t)
    with pytest.raises(squeeze.SqueezeError, match=SHOWN):
        squeeze.apply(t.model, "divprune")
    monkeypatch.delitem(TABLE, "llava")
    assert squeeze.check(t.model)["verified"] is False
    squeeze.apply(t.model, "divprune").remove()
