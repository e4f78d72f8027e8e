"""Tiny models whose images are tiles or patches of any number, told by arrays beside the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tiny.parts import (
    AUDIO,
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
)

TILE_MARK, BREAK, GLOBAL = 105, 107, 108


def _video_llama_3() -> Any:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=14)
    config = hf.VideoLlama3Config(
        vision_config=vision, text_config=qwen2_text(), image_token_id=IMAGE, video_token_id=VIDEO
    )
    return build(hf.VideoLlama3ForConditionalGeneration, config)


def _video_llama_3_image(n: int) -> Piece:
    height, width = ((4, 6), (6, 4), (4, 4))[n % 3]
    arrays = {
        "pixel_values": noise(n, height * width, 3 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, height, width]]),
        "image_merge_sizes": torch.tensor([1]),
    }
    return Piece((IMAGE,) * (height * width), arrays)


def _video_llama_3_video(n: int) -> Piece:
    """Return a video of frames of 2x4 tokens; from its second frame on every third token is left out by the mask."""
    frames = (3, 2, 4)[n % 3]
    keep = torch.ones(frames, 8, dtype=torch.bool)
    if n % 3:
        keep[1:, ::3] = False
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, *(VIDEO,) * int(keep[frame].sum()), 30)
    arrays = {
        "pixel_values_videos": noise(50 + n, frames * 4 * 8, 3 * 14 * 14),
        "video_grid_thw": torch.tensor([[frames, 4, 8]]),
        "video_merge_sizes": torch.tensor([2]),
        "video_compression_mask": keep.flatten(),
    }
    return Piece(ids, arrays)


def _lfm2_vl() -> Any:
    vision = dict(model_type="siglip2_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    vision |= dict(num_attention_heads=4, patch_size=7, num_patches=64, vision_use_head=False)
    text = llama_text(model_type="lfm2", layer_types=["conv", "full_attention"] * (LAYERS // 2))
    text |= dict(block_auto_adjust_ff_dim=False)
    text.pop("head_dim")
    config = hf.Lfm2VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=48,
    )
    return build(hf.Lfm2VlForConditionalGeneration, config)


def _lfm2_image(n: int) -> Piece:
    """Return an image of one tile of any shape, or of two tiles and a thumbnail; tiles are padded to 64 patches."""
    shapes = ([(8, 8)], [(6, 10)], [(8, 6), (8, 6), (4, 6)])[n % 3]
    ids: tuple[int, ...] = (START,)
    for number, (height, width) in enumerate(shapes):
        mark = (TILE_MARK + number,) if len(shapes) > 1 else ()
        ids += (*mark, *(IMAGE,) * (height * width // 4))
    mask = torch.zeros(len(shapes), 64, dtype=torch.long)
    for row, (height, width) in enumerate(shapes):
        mask[row, : height * width] = 1
    arrays = {
        "pixel_values": noise(n, len(shapes), 64, 3 * 7 * 7) * mask[..., None],
        "spatial_shapes": torch.tensor(shapes),
        "pixel_attention_mask": mask,
    }
    return Piece((*ids, END), arrays)


def _llama4() -> Any:
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    vision |= dict(vision_output_dim=48, image_size=56, patch_size=7, projector_input_dim=48, projector_output_dim=48)
    text = llama_text(intermediate_size=32, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1)
    text |= dict(moe_layers=[1, 3], no_rope_layers=[1, 0, 1, 0], attention_chunk_size=512, floor_scale=8192)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    text.pop("model_type")
    config = hf.Llama4Config(
        vision_config=vision | dict(pixel_shuffle_ratio=0.5),
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return build(hf.Llama4ForConditionalGeneration, config)


def _llama4_image(n: int) -> Piece:
    """Return an image of one tile, or of tiles with separators between them and the small whole picture last."""
    rows, columns = ((1, 1), (1, 2), (2, 1))[n % 3]
    ids: tuple[int, ...] = (START,)
    tiles = rows * columns
    if tiles > 1:
        for _ in range(rows):
            for column in range(columns):
                ids += (*(IMAGE,) * 16, TILE_MARK if column + 1 < columns else BREAK)
        tiles += 1
    return Piece((*ids, GLOBAL, *(IMAGE,) * 16, END), {"pixel_values": noise(n, tiles, 3, 56, 56)})


def _phi4_multimodal() -> Any:
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=112)
    eyes |= dict(patch_size=14, crop_size=112, image_token_id=IMAGE, feature_layer=-2)
    ears = dict(hidden_size=32, intermediate_size=48, num_blocks=2, num_attention_heads=4, ext_pw_out_channel=32)
    ears |= dict(depthwise_separable_out_channel=32, nemo_conv_channels=16, input_size=16, audio_token_id=AUDIO)
    text = llama_text(original_max_position_embeddings=1024)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0})
    for name in ("model_type", "head_dim"):
        text.pop(name)
    config = hf.Phi4MultimodalConfig(
        **text, vision_config=eyes, audio_config=ears | dict(feature_layer=-2, time_reduction=8)
    )
    model = build(hf.Phi4MultimodalForCausalLM, config)
    # The library marks its two-way vision tower as causal: sdpa is then causal where no crop is padded, and only there.
    for layer in model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
        layer.self_attn.is_causal = False
    return model


def _phi4_image(n: int) -> Piece:
    """Return crops of 4x4 tokens, each row with a separator, then one separator, then the whole picture likewise."""
    columns = (1, 2, 1)[n % 3]
    useful = 3 if n % 3 == 2 else 4 * columns  # the last image fills three columns of its crop only
    mask = torch.ones(1, 1 + columns, 8, 8, dtype=torch.long)
    if n % 3 == 2:
        mask[:, 1, :, 2 * useful :] = 0
    tokens = 4 * (useful + 1) + 1 + 4 * 5
    arrays = {
        "image_pixel_values": noise(n, 1, 1 + columns, 3, 112, 112),
        "image_sizes": torch.tensor([[112, 112 * columns]]),
        "image_attention_mask": mask,
    }
    return Piece((IMAGE,) * tokens, arrays)


def _phi4_audio(n: int) -> Piece:
    # One length for all: the library adds its padding mask as ones and zeros, so padded sound is heard.
    tokens = 16
    arrays = {
        "audio_input_features": noise(80 + n, 1, 8 * tokens, 16),
        "audio_embed_sizes": torch.tensor([tokens]),
        "audio_attention_mask": torch.ones(1, 8 * tokens, dtype=torch.bool),
    }
    return Piece((AUDIO,) * tokens, arrays)


def _mllama() -> Any:
    vision = dict(hidden_size=32, num_hidden_layers=3, num_global_layers=1, attention_heads=4, intermediate_size=64)
    vision |= dict(vision_output_dim=96, image_size=28, patch_size=7, max_num_tiles=2)
    vision |= dict(intermediate_layers_indices=[0, 1], supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])
    text = llama_text(num_hidden_layers=5, cross_attention_layers=[1, 3])
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    for name in ("model_type", "head_dim"):
        text.pop(name)
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = build(hf.MllamaForConditionalGeneration, config)
    with torch.no_grad():  # the gates start at zero, which would hide the image
        for name, weight in model.named_parameters():
            if name.endswith("_gate"):
                weight.fill_(0.7)
    return model


def _mllama_image(n: int) -> Piece:
    """Return an image of one or two tiles; one token in the text stands for it."""
    shape = (2, 1, 3)[n % 3]  # of supported_aspect_ratios, counted from one
    tiles = 1 if shape == 1 else 2
    pixels = noise(n, 1, 1, 2, 3, 28, 28)
    pixels[:, :, tiles:] = 0
    arrays = {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[shape]]),
        "aspect_ratio_mask": (torch.arange(2) < tiles).long()[None, None],
    }
    return Piece((IMAGE,), arrays)


def _cross_mask(ids: Tensor, arrays: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return which tiles a token sees: those of the last image before it. A missing image has one empty tile."""
    if "aspect_ratio_mask" not in arrays:
        return {}
    tiles = arrays["aspect_ratio_mask"].clone()
    number = (ids == IMAGE).cumsum(-1) - 1
    image = torch.arange(tiles.shape[1])
    mask = (number[..., None] == image)[..., None] * tiles[:, None]
    tiles[..., 0] = 1
    return {"cross_attention_mask": mask * arrays["attention_mask"][..., None, None], "aspect_ratio_mask": tiles}


TILE_LINE = {
    "video_llama_3": Family(_video_llama_3, _video_llama_3_image, _video_llama_3_video, tower="model.vision_model"),
    "lfm2_vl": Family(_lfm2_vl, _lfm2_image),
    "llama4": Family(_llama4, _llama4_image, tower="vision_model", broken=("5.24.0",)),
    "phi4_multimodal": Family(
        _phi4_multimodal,
        _phi4_image,
        visual_ids=(IMAGE, AUDIO),
        tower="model.embed_tokens_extend.image_embed.img_processor",
        audio=_phi4_audio,
    ),
    "mllama": Family(
        _mllama,
        _mllama_image,
        visual_ids=(IMAGE,),
        tower="model.vision_model",
        per_sample=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
        derived=_cross_mask,
        before=(),
    ),
}
