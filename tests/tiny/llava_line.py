"""Tiny models with a batched tower, a projector and 1-D rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.parts import END, IMAGE, START, VIDEO, Family, Piece, build, llama_text, noise, qwen2_text, tower_config

PINPOINTS = [[28, 56], [56, 28], [56, 56]]
SIZES = ((28, 56), (56, 28), (56, 56))
# Base view 4x4, then the grid of the image with one newline feature at the end of each row.
ANYRES_TOKENS = (16 + 4 * 9, 16 + 8 * 5, 16 + 8 * 9)
ANYRES_CROPS = (3, 3, 5)
FRAMES = 8


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=tower_config("clip_vision_model", 35, projection_dim=32),
        text_config=llama_text(),
        image_token_index=IMAGE,
        image_seq_length=25,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return build(hf.LlavaForConditionalGeneration, config)


def _llava_image(n: int) -> Piece:
    return Piece((IMAGE,) * 25, {"pixel_values": noise(n, 1, 3, 35, 35)})


def _anyres_image(n: int) -> Piece:
    shape = n % len(SIZES)
    arrays = {"pixel_values": noise(n, 1, ANYRES_CROPS[shape], 3, 28, 28), "image_sizes": torch.tensor([SIZES[shape]])}
    return Piece((IMAGE,) * ANYRES_TOKENS[shape], arrays)


def _llava_next() -> Any:
    config = hf.LlavaNextConfig(
        vision_config=tower_config("clip_vision_model", 28, projection_dim=32),
        text_config=llama_text(),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return build(hf.LlavaNextForConditionalGeneration, config)


def _llava_next_video() -> Any:
    config = hf.LlavaNextVideoConfig(
        vision_config=tower_config("clip_vision_model", 28, projection_dim=32),
        text_config=llama_text(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        spatial_pool_mode="average",
        spatial_pool_stride=2,
    )
    return build(hf.LlavaNextVideoForConditionalGeneration, config)


def _pooled_video(n: int) -> Piece:
    return Piece((VIDEO,) * (FRAMES * 4), {"pixel_values_videos": noise(50 + n, 1, FRAMES, 3, 28, 28)})


def _llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=tower_config("siglip_vision_model", 28, vision_use_head=False),
        text_config=qwen2_text(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return build(hf.LlavaOnevisionForConditionalGeneration, config)


def _onevision_video(n: int) -> Piece:
    # One newline feature closes the video.
    return Piece((VIDEO,) * (FRAMES * 4 + 1), {"pixel_values_videos": noise(50 + n, 1, FRAMES, 3, 28, 28)})


def _internvl() -> Any:
    config = hf.InternVLConfig(
        vision_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=[56, 56],
            patch_size=[7, 7],
        ),
        text_config=qwen2_text(),
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    return build(hf.InternVLForConditionalGeneration, config)


def _internvl_image(n: int) -> Piece:
    tiles = 1 + n % 3  # tiles of one image stand back to back
    return Piece((START, *(IMAGE,) * (16 * tiles), END), {"pixel_values": noise(n, tiles, 3, 56, 56)})


def _internvl_video(n: int) -> Piece:
    ids: tuple[int, ...] = ()
    for frame in range(3):
        ids += (20 + frame, START, *(IMAGE,) * 16, END)
    return Piece(ids, {"pixel_values": noise(50 + n, 3, 3, 56, 56)})


LLAVA_LINE = {
    "llava": Family(_llava, _llava_image),
    "llava_next": Family(_llava_next, _anyres_image),
    "llava_next_video": Family(_llava_next_video, _anyres_image, _pooled_video),
    "llava_onevision": Family(_llava_onevision, _anyres_image, _onevision_video),
    "internvl": Family(_internvl, _internvl_image, _internvl_video, visual_ids=(IMAGE,)),
}
