"""Tiny models with a batched CLIP or SigLIP tower, a projector and a shared text model: few surprises."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tiny.parts import (
    END,
    IMAGE,
    LAYERS,
    START,
    VIDEO,
    Family,
    Piece,
    build,
    llama_text,
    noise,
    qwen2_text,
    tower_config,
)

TILE_START = 105


def siglip(image: int = 56, **changes: Any) -> dict[str, Any]:
    """Return the config of a SigLIP tower without a pooling head."""
    return tower_config("siglip_vision_model", image, vision_use_head=False, **changes)


def _vipllava() -> Any:
    config = hf.VipLlavaConfig(
        vision_config=tower_config("clip_vision_model", 35, layers=4, projection_dim=32),
        text_config=llama_text(),
        image_token_index=IMAGE,
        image_seq_length=25,
        vision_feature_layers=(-2, -3, 1),
    )
    return build(hf.VipLlavaForConditionalGeneration, config)


def _video_llava() -> Any:
    config = hf.VideoLlavaConfig(
        vision_config=tower_config("clip_vision_model", 35, projection_dim=32),
        text_config=llama_text(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=25,
        video_seq_length=4 * 26,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return build(hf.VideoLlavaForConditionalGeneration, config)


def _video_llava_image(n: int) -> Piece:
    return Piece((IMAGE,) * 25, {"pixel_values_images": noise(n, 1, 3, 35, 35)})


def _video_llava_video(n: int) -> Piece:
    # Each frame keeps its CLS token. All videos of a batch have the same number of frames: one tensor, no mask.
    return Piece((VIDEO,) * (4 * 26), {"pixel_values_videos": noise(50 + n, 1, 4, 3, 35, 35)})


def _plain_image(n: int) -> Piece:
    return Piece((IMAGE,) * 25, {"pixel_values": noise(n, 1, 3, 35, 35)})


def _deepseek_vl() -> Any:
    config = hf.DeepseekVLConfig(vision_config=siglip(35), text_config=llama_text(), image_token_id=IMAGE)
    return build(hf.DeepseekVLForConditionalGeneration, config)


def _deepseek_vl_hybrid() -> Any:
    sharp = dict(model_type="sam_vision_model", hidden_size=32, output_channels=16, num_hidden_layers=2)
    sharp |= dict(num_attention_heads=4, image_size=64, patch_size=16, window_size=2, global_attn_indexes=[1])
    config = hf.DeepseekVLHybridConfig(
        vision_config=siglip(35),
        high_res_vision_config=sharp | dict(mlp_dim=64, num_pos_feats=16),
        text_config=llama_text(),
        image_token_id=IMAGE,
    )
    return build(hf.DeepseekVLHybridForConditionalGeneration, config)


def _deepseek_vl_hybrid_image(n: int) -> Piece:
    """Return an image, once small and once large; the encoder of the large one says something about each token."""
    piece = _plain_image(n)
    return Piece(piece.ids, {**piece.arrays, "high_res_pixel_values": noise(30 + n, 1, 3, 64, 64)})


def cohere2_text(**changes: Any) -> dict[str, Any]:
    """Return the config of a Cohere2 text model: sliding layers with rotary positions, full layers without."""
    types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return llama_text(model_type="cohere2", sliding_window=512, layer_types=types) | changes


def _aya_vision() -> Any:
    config = hf.AyaVisionConfig(
        vision_config=siglip(), text_config=cohere2_text(), image_token_index=IMAGE, downsample_factor=2
    )
    return build(hf.AyaVisionForConditionalGeneration, config)


def _aya_image(n: int) -> Piece:
    """Return an image of 1 to 3 tiles, each behind a text token that names it."""
    tiles = (1, 3, 2)[n % 3]
    ids: tuple[int, ...] = (START,)
    for tile in range(tiles):
        ids += (TILE_START + tile, *(IMAGE,) * 16)
    return Piece((*ids, END), {"pixel_values": noise(n, tiles, 3, 56, 56)})


def _cohere2_vision() -> Any:
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(),
        text_config=cohere2_text(),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return build(hf.Cohere2VisionForConditionalGeneration, config)


def _cohere2_image(n: int) -> Piece:
    """Return an image of 1 to 3 tiles, each with a line break behind it."""
    tiles = (1, 3, 2)[n % 3]
    return Piece((START, *((*(IMAGE,) * 16, 107) * tiles), END), {"pixel_values": noise(n, tiles, 3, 56, 56)})


OVIS_INDICATORS = [120, 121, 122, 123, 124]  # start of an image, of its first tile, of a next column, of a row, end


def _ovis2() -> Any:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56)
    vision |= dict(patch_size=7, vocab_size=48, hidden_stride=2, num_visual_indicator_tokens=len(OVIS_INDICATORS))
    config = hf.Ovis2Config(
        vision_config=vision,
        text_config=qwen2_text(),
        image_token_id=IMAGE,
        visual_indicator_token_ids=OVIS_INDICATORS,
        vocab_size=160,
        hidden_size=64,
    )
    return build(hf.Ovis2ForConditionalGeneration, config)


def _ovis2_image(n: int) -> Piece:
    """Return an image of 1 to 3 tiles; between them stand indicator tokens with learned embeddings."""
    tiles = (1, 3, 2)[n % 3]
    start, first, column, _, end = OVIS_INDICATORS
    ids: tuple[int, ...] = (start,)
    for tile in range(tiles):
        ids += (first if tile == 0 else column, *(IMAGE,) * 16)
    return Piece((*ids, end), {"pixel_values": noise(n, tiles, 3, 56, 56)})


PLAIN_LINE = {
    "vipllava": Family(_vipllava, _plain_image),
    "video_llava": Family(_video_llava, _video_llava_image, _video_llava_video, tower="model.image_tower"),
    "deepseek_vl": Family(_deepseek_vl, _plain_image, tower="model.vision_model"),
    "deepseek_vl_hybrid": Family(_deepseek_vl_hybrid, _deepseek_vl_hybrid_image, tower="model.vision_model"),
    "aya_vision": Family(_aya_vision, _aya_image),
    "cohere2_vision": Family(_cohere2_vision, _cohere2_image),
    "ovis2": Family(_ovis2, _ovis2_image),
}
