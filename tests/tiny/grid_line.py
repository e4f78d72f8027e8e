"""Tiny models with a packed tower whose patches come with their grid, beside the Qwen line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tiny.moe_line import IDS, VIDEO_GRIDS, image_arrays, image_tokens, video_arrays
from tiny.parts import END, HIDDEN, IMAGE, LAYERS, START, VIDEO, Family, Piece, build, llama_text, mrope_text, noise

VIDEO_START, VIDEO_END = 108, 109
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
PACKED: dict[str, Any] = dict(depth=3, hidden_size=32, num_heads=4, spatial_merge_size=2, temporal_patch_size=2)


def grid_image(n: int, patch: int) -> Piece:
    """Return an image of any shape between a start and an end."""
    return Piece((START, *(IMAGE,) * image_tokens(n), END), image_arrays(n, patch))


def grid_video(n: int, patch: int) -> Piece:
    """Return a video whose frames stand together between a start and an end."""
    frames, height, width = VIDEO_GRIDS[n % len(VIDEO_GRIDS)]
    return Piece((START, *(VIDEO,) * (frames * height * width // 4), END), video_arrays(n, patch))


def _image14(n: int) -> Piece:
    return grid_image(n, 14)


def _video14(n: int) -> Piece:
    return grid_video(n, 14)


def _image16(n: int) -> Piece:
    return grid_image(n, 16)


def _video16(n: int) -> Piece:
    return grid_video(n, 16)


def _stamped_video(n: int) -> Piece:
    """Return a video whose frames stand apart, each behind its time stamp (here one text token)."""
    frames, height, width = VIDEO_GRIDS[n % len(VIDEO_GRIDS)]
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, START, *(VIDEO,) * (height * width // 4), END)
    return Piece(ids, video_arrays(n, 16))


def _windowed(**changes: Any) -> dict[str, Any]:
    base = PACKED | dict(patch_size=14, out_hidden_size=HIDDEN, intermediate_size=64, window_size=56)
    return base | dict(fullatt_block_indexes=[1]) | changes


def _exaone4_5() -> Any:
    types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    text = llama_text(model_type="exaone4", sliding_window=512, layer_types=types, rope_parameters=dict(ROPE))
    config = hf.Exaone4_5_Config(
        text_config=text,
        vision_config=_windowed(num_key_value_heads=2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return build(hf.Exaone4_5_ForConditionalGeneration, config)


def _hyperclovax() -> Any:
    config = hf.HyperCLOVAXVisionV2Config(
        text_config=llama_text(model_type="hyperclovax", rope_parameters=dict(ROPE)),
        vision_config=_windowed(model_type="qwen2_5_vl_vision", out_hidden_size=48, tokens_per_second=2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return build(hf.HyperCLOVAXVisionV2ForConditionalGeneration, config)


def _cohere_compass() -> Any:
    types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    mrope = ROPE | {"mrope_section": [4, 2, 2]}
    text = mrope_text(sliding_window=512, layer_types=types)
    text["rope_parameters"] = {"sliding_attention": mrope, "full_attention": None}
    vision = PACKED | dict(patch_size=16, out_hidden_size=HIDDEN, intermediate_size=64, num_position_embeddings=16)
    config = hf.CohereCompassConfig(
        text_config=text, vision_config=vision | dict(deepstack_visual_indexes=[0, 1]), **IDS
    )
    return build(hf.CohereCompassForConditionalGeneration, config)


def _lfm3_vl() -> Any:
    types = ["conv", "sliding_attention", "conv", "full_attention"]
    text = llama_text(model_type="lfm3", layer_types=types, sliding_window=512)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=16)
    vision |= dict(num_key_value_heads=2, layer_types=["conv", "full_attention", "full_attention"])
    config = hf.Lfm3VlConfig(text_config=text, vision_config=vision, projector_hidden_size=48, **IDS)
    return build(hf.Lfm3VlForConditionalGeneration, config, std=0.08)


def _cosmos3_omni() -> Any:
    vision = PACKED | dict(patch_size=16, out_hidden_size=HIDDEN, intermediate_size=64, num_position_embeddings=16)
    config = hf.Cosmos3OmniConfig(
        text_config=mrope_text(model_type="qwen3_vl_text", head_dim=16),
        vision_config=vision | dict(model_type="qwen3_vl_vision", deepstack_visual_indexes=[0, 1]),
        **IDS,
    )
    return build(hf.Cosmos3OmniForConditionalGeneration, config)


def _cosmos3_edge() -> Any:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=16)
    text = mrope_text(head_dim=16)
    text["rope_parameters"] = ROPE | {"mrope_section": [4, 2, 2]}
    config = hf.Cosmos3EdgeConfig(
        text_config=text, vision_config=vision | dict(num_patches=16), projector_hidden_size=48, **IDS
    )
    return build(hf.Cosmos3EdgeForConditionalGeneration, config)


def _edge_image(n: int) -> Piece:
    return one_frame(_image16(n))


def _edge_video(n: int) -> Piece:
    return one_frame(_stamped_video(n))


def one_frame(piece: Piece) -> Piece:
    """Return a piece whose patches span one frame in place of two."""
    half = {name: array.chunk(2, -1)[0] if "pixel" in name else array for name, array in piece.arrays.items()}
    return Piece(piece.ids, half)


def _hunyuan_vl() -> Any:
    text = llama_text(rope_parameters=ROPE | {"mrope_section": [2, 2, 2, 2]})
    text.pop("model_type")
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=14)
    vision |= dict(out_hidden_size=HIDDEN, text_hidden_size=HIDDEN, max_image_size=112)
    config = hf.HunYuanVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return build(hf.HunYuanVLForConditionalGeneration, config)


def _hunyuan_image(n: int) -> Piece:
    """Return an image with a token of its own at its start, behind each row and at its end."""
    piece = _ernie_image(n)
    _, height, width = piece.arrays["image_grid_thw"][0].tolist()
    return Piece((START, *(IMAGE,) * (height // 2 * (width // 2 + 1) + 2), END), piece.arrays)


def _ernie() -> Any:
    text = mrope_text(moe_intermediate_size=[32, 32], moe_num_experts=4, moe_k=2, moe_num_shared_experts=1)
    vision = dict(depth=3, hidden_size=32, num_heads=4, patch_size=14, spatial_merge_size=2, intermediate_size=64)
    text["rope_parameters"] = ROPE | {"mrope_section": [3, 3, 2]}
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )
    return build(hf.Ernie4_5_VLMoeForConditionalGeneration, config)


def _ernie_image(n: int) -> Piece:
    piece = grid_image(n, 14)
    pixels = piece.arrays["pixel_values"]
    return Piece(piece.ids, {**piece.arrays, "pixel_values": pixels[:, : 3 * 14 * 14]})


def _ernie_video(n: int) -> Piece:
    """Return a video whose frames are merged two by two."""
    frames, height, width = ((4, 4, 8), (2, 6, 6), (4, 4, 4))[n % 3]
    arrays = {
        "pixel_values_videos": noise(50 + n, frames * height * width, 3 * 14 * 14),
        "video_grid_thw": torch.tensor([[frames, height, width]]),
    }
    return Piece((VIDEO_START, *(VIDEO,) * (frames * height * width // 8), VIDEO_END), arrays)


def _ernie_types(ids: Tensor, _: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return which tokens go through the experts for pictures: the starts and ends as well."""
    image, video = [IMAGE, START, END], [VIDEO, VIDEO_START, VIDEO_END]
    types = torch.isin(ids, torch.tensor(image)).int() + 2 * torch.isin(ids, torch.tensor(video)).int()
    return {"moe_mm_token_type_ids": types}


GRID_LINE = {
    "exaone4_5": Family(
        _exaone4_5, _image14, _video14, tower="model.visual", wants="Exaone4_5_ForConditionalGeneration"
    ),
    "hyperclovax_vision_v2": Family(
        _hyperclovax,
        _image14,
        _video14,
        tower="model.vision_model",
        wants="HyperCLOVAXVisionV2ForConditionalGeneration",
    ),
    "cohere_compass": Family(
        _cohere_compass,
        _image16,
        _stamped_video,
        token_types=True,
        tower="model.visual",
        wants="CohereCompassForConditionalGeneration",
    ),
    "lfm3_vl": Family(_lfm3_vl, _image16, _video16, wants="Lfm3VlForConditionalGeneration"),
    "cosmos3_omni": Family(
        _cosmos3_omni,
        _image16,
        _stamped_video,
        token_types=True,
        tower="model.visual",
        wants="Cosmos3OmniForConditionalGeneration",
    ),
    "cosmos3_edge": Family(
        _cosmos3_edge,
        _edge_image,
        _edge_video,
        token_types=True,
        tower="model.visual",
        wants="Cosmos3EdgeForConditionalGeneration",
    ),
    "hunyuan_vl": Family(
        _hunyuan_vl,
        _hunyuan_image,
        visual_ids=(IMAGE,),
        token_types=True,
        tower="model.vision_tower",
        wants="HunYuanVLForConditionalGeneration",
    ),
    "ernie4_5_vl_moe": Family(
        _ernie,
        _ernie_image,
        _ernie_video,
        token_types=True,
        derived=_ernie_types,
        wants="Ernie4_5_VLMoeForConditionalGeneration",
    ),
}
