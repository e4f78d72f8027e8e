"""Tiny models of the later Qwen families: experts, recurrent layers, sound."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.parts import AUDIO, END, HIDDEN, IMAGE, START, VIDEO, Family, Piece, build, mrope_text, noise

AUDIO_START, AUDIO_END = 105, 106
IDS: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
EXPERTS: dict[str, Any] = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
IMAGE_GRIDS = ((1, 8, 8), (1, 6, 10), (1, 12, 8))  # in patches; a token covers 2x2
VIDEO_GRIDS = ((4, 4, 8), (2, 6, 6), (3, 4, 4))
MELS = 16


def image_arrays(n: int, patch: int) -> dict[str, torch.Tensor]:
    """Return the packed patches and the grid of an image."""
    grid = IMAGE_GRIDS[n % len(IMAGE_GRIDS)]
    return {
        "pixel_values": noise(n, grid[1] * grid[2], 3 * 2 * patch * patch),
        "image_grid_thw": torch.tensor([grid]),
    }


def video_arrays(n: int, patch: int) -> dict[str, torch.Tensor]:
    """Return the packed patches and the grid of a video."""
    grid = VIDEO_GRIDS[n % len(VIDEO_GRIDS)]
    return {
        "pixel_values_videos": noise(50 + n, grid[0] * grid[1] * grid[2], 3 * 2 * patch * patch),
        "video_grid_thw": torch.tensor([grid]),
    }


def image_tokens(n: int) -> int:
    """Return the number of tokens of image `n`."""
    _, height, width = IMAGE_GRIDS[n % len(IMAGE_GRIDS)]
    return height * width // 4


def _image(n: int, patch: int) -> Piece:
    return Piece((START, *(IMAGE,) * image_tokens(n), END), image_arrays(n, patch))


def _image14(n: int) -> Piece:
    return _image(n, 14)


def _image16(n: int) -> Piece:
    return _image(n, 16)


def _stamped_video(n: int) -> Piece:
    """Return a video whose frames stand apart, each behind its time stamp (here one text token)."""
    frames, height, width = VIDEO_GRIDS[n % len(VIDEO_GRIDS)]
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, START, *(VIDEO,) * (height * width // 4), END)
    return Piece(ids, video_arrays(n, 16))


def _omni_video(n: int, patch: int) -> Piece:
    frames, height, width = VIDEO_GRIDS[n % len(VIDEO_GRIDS)]
    arrays = video_arrays(n, patch) | {"video_second_per_grid": torch.tensor([1.0])}
    return Piece((START, *(VIDEO,) * (frames * height * width // 4), END), arrays)


def _omni_video14(n: int) -> Piece:
    return _omni_video(n, 14)


def _omni_video16(n: int) -> Piece:
    return _omni_video(n, 16)


def _sound(n: int, frames: int, tokens: int) -> Piece:
    arrays = {
        "input_features": noise(80 + n, 1, MELS, frames),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
    }
    return Piece((AUDIO_START, *(AUDIO,) * tokens, AUDIO_END), arrays)


def _omni2_audio(n: int) -> Piece:
    frames = (72, 40, 55)[n % 3]
    return _sound(n, frames, ((frames - 1) // 2 - 1) // 2 + 1)


def _omni3_audio(n: int) -> Piece:
    # 100 mel frames become 13 tokens, a remainder of r becomes r / 8, rounded up.
    frames, tokens = ((150, 20), (100, 13), (70, 9))[n % 3]
    return _sound(n, frames, tokens)


def _tower16(**changes: Any) -> dict[str, Any]:
    base = dict(depth=3, hidden_size=32, num_heads=4, patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
    base |= dict(out_hidden_size=HIDDEN, intermediate_size=64, num_position_embeddings=16)
    return base | changes


def _qwen3_vl_moe() -> Any:
    vision = _tower16(deepstack_visual_indexes=[0, 1])
    config = hf.Qwen3VLMoeConfig(text_config=mrope_text(head_dim=16, **EXPERTS), vision_config=vision, **IDS)
    return build(hf.Qwen3VLMoeForConditionalGeneration, config)


def hybrid_text(**changes: Any) -> dict[str, Any]:
    """Return the config of a Qwen3.5 text model: recurrent and full attention layers in turn."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    base = dict(head_dim=32, rope_parameters=rope, linear_key_head_dim=16, linear_value_head_dim=16)
    base |= dict(linear_num_key_heads=2, linear_num_value_heads=4)
    base |= dict(layer_types=["linear_attention", "full_attention"] * 2)
    return mrope_text(**base) | changes


def _qwen3_5() -> Any:
    config = hf.Qwen3_5Config(text_config=hybrid_text(), vision_config=_tower16(), **IDS)
    return build(hf.Qwen3_5ForConditionalGeneration, config, std=0.05)


def _qwen3_5_moe() -> Any:
    text = hybrid_text(shared_expert_intermediate_size=32, **EXPERTS)
    config = hf.Qwen3_5MoeConfig(text_config=text, vision_config=_tower16(), **IDS)
    return build(hf.Qwen3_5MoeForConditionalGeneration, config, std=0.05)


def _ears(**changes: Any) -> dict[str, Any]:
    base = dict(num_mel_bins=MELS, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=32)
    return base | dict(max_source_positions=100, output_dim=HIDDEN) | changes


OMNI_IDS: dict[str, Any] = dict(
    audio_start_token_id=AUDIO_START,
    audio_end_token_id=AUDIO_END,
    vision_start_token_id=START,
    vision_end_token_id=END,
)


def _qwen2_5_omni() -> Any:
    vision = dict(depth=3, hidden_size=32, out_hidden_size=HIDDEN, intermediate_size=64, num_heads=4, patch_size=14)
    vision |= dict(spatial_merge_size=2, temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1])
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config=mrope_text(),
        vision_config=vision,
        audio_config=_ears(n_window=10),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        **OMNI_IDS,
    )
    return build(hf.Qwen2_5OmniThinkerForConditionalGeneration, config)


def _qwen3_omni_moe() -> Any:
    ears = _ears(n_window=50, n_window_infer=200, conv_chunksize=100, downsample_hidden_size=8)
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config=mrope_text(head_dim=16, **EXPERTS),
        vision_config=_tower16(deepstack_visual_indexes=[0, 1]),
        audio_config=ears,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        **OMNI_IDS,
    )
    return build(hf.Qwen3OmniMoeThinkerForConditionalGeneration, config)


_OMNI_VISUAL = (IMAGE, VIDEO, AUDIO)
MOE_LINE = {
    "qwen3_vl_moe": Family(_qwen3_vl_moe, _image16, _stamped_video, token_types=True, tower="model.visual"),
    "qwen3_5": Family(_qwen3_5, _image16, _stamped_video, token_types=True, tower="model.visual"),
    "qwen3_5_moe": Family(_qwen3_5_moe, _image16, _stamped_video, token_types=True, tower="model.visual"),
    "qwen2_5_omni": Family(
        _qwen2_5_omni, _image14, _omni_video14, _OMNI_VISUAL, tower="model.visual", audio=_omni2_audio
    ),
    "qwen3_omni_moe": Family(
        _qwen3_omni_moe, _image16, _omni_video16, _OMNI_VISUAL, tower="model.visual", audio=_omni3_audio
    ),
}
