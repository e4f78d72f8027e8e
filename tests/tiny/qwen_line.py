"""Tiny models with a packed tower, a 2x2 merger and M-RoPE positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.parts import END, HIDDEN, IMAGE, START, VIDEO, Family, Piece, build, mrope_text, noise

IDS: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
IMAGE_GRIDS = ((1, 8, 8), (1, 6, 10), (1, 12, 8))  # in patches; a token covers 2x2
VIDEO_GRID = (4, 4, 8)


def _patches(seed: int, grid: tuple[int, int, int], patch: int) -> torch.Tensor:
    return noise(seed, grid[0] * grid[1] * grid[2], 3 * 2 * patch * patch)


def _image(n: int, patch: int) -> Piece:
    grid = IMAGE_GRIDS[n % len(IMAGE_GRIDS)]
    tokens = grid[1] * grid[2] // 4
    arrays = {"pixel_values": _patches(n, grid, patch), "image_grid_thw": torch.tensor([grid])}
    return Piece((START, *(IMAGE,) * tokens, END), arrays)


def _video(n: int, patch: int) -> Piece:
    tokens = VIDEO_GRID[0] * VIDEO_GRID[1] * VIDEO_GRID[2] // 4
    arrays = {"pixel_values_videos": _patches(50 + n, VIDEO_GRID, patch), "video_grid_thw": torch.tensor([VIDEO_GRID])}
    return Piece((START, *(VIDEO,) * tokens, END), arrays)


def _image14(n: int) -> Piece:
    return _image(n, 14)


def _video14(n: int) -> Piece:
    return _video(n, 14)


def _timed_video14(n: int) -> Piece:
    piece = _video(n, 14)
    return Piece(piece.ids, {**piece.arrays, "second_per_grid_ts": torch.tensor([1.0])})


def _image16(n: int) -> Piece:
    return _image(n, 16)


def _stamped_video16(n: int) -> Piece:
    """Return a video whose frames stand apart, each behind its time stamp (here one text token)."""
    frames, per_frame = VIDEO_GRID[0], VIDEO_GRID[1] * VIDEO_GRID[2] // 4
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, START, *(VIDEO,) * per_frame, END)
    return Piece(ids, _video(n, 16).arrays)


def _tower(patch: int, **changes: Any) -> dict[str, Any]:
    base = dict(depth=3, hidden_size=32, num_heads=4, patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    return base | changes


def _qwen2_vl() -> Any:
    vision = _tower(14, depth=2, embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2)
    config = hf.Qwen2VLConfig(text_config=mrope_text(), vision_config=vision, **IDS)
    return build(hf.Qwen2VLForConditionalGeneration, config)


def _qwen2_5_vl() -> Any:
    vision = _tower(14, out_hidden_size=HIDDEN, intermediate_size=64, window_size=56, fullatt_block_indexes=[1])
    config = hf.Qwen2_5_VLConfig(text_config=mrope_text(), vision_config=vision | dict(tokens_per_second=2), **IDS)
    return build(hf.Qwen2_5_VLForConditionalGeneration, config)


def _qwen3_vl() -> Any:
    vision = _tower(16, out_hidden_size=HIDDEN, intermediate_size=64, num_position_embeddings=16)
    vision |= dict(deepstack_visual_indexes=[0, 1])
    config = hf.Qwen3VLConfig(text_config=mrope_text(head_dim=16), vision_config=vision, **IDS)
    return build(hf.Qwen3VLForConditionalGeneration, config)


QWEN_LINE = {
    "qwen2_vl": Family(_qwen2_vl, _image14, _video14, token_types=True, tower="model.visual"),
    "qwen2_5_vl": Family(_qwen2_5_vl, _image14, _timed_video14, token_types=True, tower="model.visual"),
    "qwen3_vl": Family(_qwen3_vl, _image16, _stamped_video16, token_types=True, tower="model.visual"),
}
