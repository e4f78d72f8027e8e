"""Tiny models of the GLM-V family: the frames of a video carry the id of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers as hf
from torch import Tensor

from tiny.moe_line import VIDEO_GRIDS, image_arrays, image_tokens, video_arrays
from tiny.parts import END, HIDDEN, IMAGE, START, VIDEO, Family, Piece, build, mrope_text

VIDEO_START, VIDEO_END = 108, 109


def _image(n: int) -> Piece:
    return Piece((START, *(IMAGE,) * image_tokens(n), END), image_arrays(n, 14))


def _video(n: int) -> Piece:
    """Return a video whose frames stand apart, each with its time stamp behind it, between a start and an end."""
    frames, height, width = VIDEO_GRIDS[n % len(VIDEO_GRIDS)]
    ids: tuple[int, ...] = (VIDEO_START,)
    for frame in range(frames):
        ids += (START, *(IMAGE,) * (height * width // 4), END, 20 + frame)
    return Piece((*ids, VIDEO_END), video_arrays(n, 14))


def _types(ids: Tensor, _: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return 2 for an image id between the start and the end of a video, 1 for another, 0 for text."""
    inside = (ids == VIDEO_START).cumsum(-1) > (ids == VIDEO_END).cumsum(-1)
    return {"mm_token_type_ids": (ids == IMAGE).long() * (1 + inside.long())}


def glm_config(config: Any, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    """Return the config of a GLM-V model."""
    base = dict(depth=2, hidden_size=32, out_hidden_size=HIDDEN, intermediate_size=64, num_heads=4, image_size=112)
    base |= dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    return config(
        text_config=mrope_text(**text),
        vision_config={**base, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


def _glm4v() -> Any:
    return build(hf.Glm4vForConditionalGeneration, glm_config(hf.Glm4vConfig, {}, {}))


def _glm46v() -> Any:
    config = glm_config(hf.Glm46VConfig, {"model_type": "glm4v_text"}, {"model_type": "glm4v_vision"})
    return build(hf.Glm46VForConditionalGeneration, config)


def _glmga() -> Any:
    config = glm_config(hf.GlmgaConfig, {"model_type": "glm4v_text"}, {"model_type": "glm4v_vision"})
    return build(hf.Glm46VForConditionalGeneration, config)


def _glm4v_moe() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    text = dict(moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, rope_parameters=rope)
    return build(hf.Glm4vMoeForConditionalGeneration, glm_config(hf.Glm4vMoeConfig, text, {}))


def glm_family(model: Any, **more: Any) -> Family:
    """Return a family of the line."""
    # One forward takes images or videos: each kind of feature must fill all placeholders of the batch.
    lacks = ("image_video",)
    seen: dict[str, Any] = dict(visual_ids=(IMAGE,), tower="model.visual", derived=_types, lacks=lacks)
    return Family(model, _image, _video, **seen, **more)


GLM_LINE = {"glm4v": glm_family(_glm4v), "glm4v_moe": glm_family(_glm4v_moe), "glm46v": glm_family(_glm46v)}
GLM_LINE["glmga"] = glm_family(_glmga, wants="GlmgaConfig")
