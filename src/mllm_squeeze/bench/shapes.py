"""Sizes of the models that can be benchmarked, by name; plain data. The weights are random, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_squeeze.errors import UnknownNameError, did_you_mean


@dataclass(frozen=True)
class Shape:
    """One model.

    line: "llava", "llava_next" or "qwen": how a picture becomes tokens. classes: names of the HuggingFace config and
    model class. text, vision: fields of their configs. fixed: the picture always gives the same number of tokens, so a
    long prompt holds several; otherwise one picture grows. rest: other fields of the config.
    """

    name: str
    line: str
    classes: tuple[str, str]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    fixed: bool = True
    rest: Mapping[str, Any] | None = None


_VICUNA: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    max_position_embeddings=65536,
)
_CLIP_L: dict[str, Any] = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
_QWEN25_TOWER: dict[str, Any] = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2,
)
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_LLAVA = ("LlavaConfig", "LlavaForConditionalGeneration")
_QWEN25 = ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration")


def _qwen(hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    base: dict[str, Any] = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers)
    base |= dict(num_attention_heads=heads, num_key_value_heads=groups, vocab_size=vocab)
    base |= dict(max_position_embeddings=128000, rope_parameters=rope)
    return {**base, **more}


_SHAPES = (
    Shape("llava-1.5-7b", "llava", _LLAVA, _VICUNA, _CLIP_L),
    Shape(
        "llava-next-7b",
        "llava_next",
        ("LlavaNextConfig", "LlavaNextForConditionalGeneration"),
        _VICUNA,
        _CLIP_L,
        rest={"image_grid_pinpoints": _PINPOINTS},
    ),
    Shape(
        "qwen2.5-vl-3b",
        "qwen",
        _QWEN25,
        _qwen(2048, 11008, 36, 16, 2, 151936),
        {**_QWEN25_TOWER, "out_hidden_size": 2048},
        fixed=False,
    ),
    Shape(
        "qwen2.5-vl-7b",
        "qwen",
        _QWEN25,
        _qwen(3584, 18944, 28, 28, 4, 152064),
        {**_QWEN25_TOWER, "out_hidden_size": 3584},
        fixed=False,
    ),
    Shape(
        "qwen3-vl-8b",
        "qwen",
        ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
        _qwen(4096, 12288, 36, 32, 8, 151936, head_dim=128)
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            }
        },
        dict(
            depth=27,
            hidden_size=1152,
            intermediate_size=4304,
            num_heads=16,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=4096,
            num_position_embeddings=2304,
            deepstack_visual_indexes=[8, 16, 24],
        ),
        fixed=False,
    ),
    Shape(
        "cpu-300m",
        "llava",
        _LLAVA,
        _VICUNA
        | dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24)
        | dict(num_attention_heads=16, num_key_value_heads=16, vocab_size=32000),
        _CLIP_L | dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4),
        fixed=False,
    ),
    Shape(
        "cpu-tiny",
        "llava",
        _LLAVA,
        _VICUNA
        | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4)
        | dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=160),
        _CLIP_L | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4),
        fixed=False,
    ),
)
SHAPES = {shape.name: shape for shape in _SHAPES}


def find_shape(name: str) -> Shape:
    """Return a shape by its name; raises UnknownNameError."""
    if name not in SHAPES:
        raise UnknownNameError(f"There is no model '{name}' to benchmark. {did_you_mean(name, SHAPES)}")
    return SHAPES[name]
