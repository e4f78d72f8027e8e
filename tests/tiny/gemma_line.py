"""Tiny models of the Gemma family: visual tokens that see each other both ways, sliding layers, shared KV."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tiny.parts import (
    AUDIO,
    END,
    HIDDEN,
    IMAGE,
    LAYERS,
    START,
    VIDEO,
    VOCAB,
    Family,
    Piece,
    build,
    llama_text,
    noise,
    tower_config,
)

TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def _siglip(image: int, **changes: Any) -> dict[str, Any]:
    return tower_config("siglip_vision_model", image, vision_use_head=False, **changes)


def _gemma3(window: int = 512, config: Any = hf.Gemma3Config) -> Any:
    text = llama_text(query_pre_attn_scalar=16, sliding_window=window, layer_types=list(TYPES))
    text.pop("model_type")
    made = config(
        text_config=text,
        vision_config=_siglip(56),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return build(hf.Gemma3ForConditionalGeneration, made)


def _shieldgemma2() -> Any:
    return _gemma3(config=hf.ShieldGemma2Config)


def _gemma3_window() -> Any:
    return _gemma3(window=12)


def _gemma3_image(n: int) -> Piece:
    """Return an image, or one whose two crops follow it (pan and scan): each 16 tokens, with text between them."""
    crops = 3 if n % 3 == 2 else 1
    ids: tuple[int, ...] = ()
    for crop in range(crops):
        ids += (*((25 + crop,) if crop else ()), START, *(IMAGE,) * 16, END)
    return Piece(ids, {"pixel_values": noise(n, crops, 3, 56, 56)})


def _image_types(ids: Tensor, _: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def _paligemma(text: str) -> Any:
    extra = dict(query_pre_attn_scalar=16, sliding_window=512) if text == "gemma2" else {}
    config = hf.PaliGemmaConfig(
        text_config=llama_text(model_type=text, **extra),
        vision_config=_siglip(35, projection_dim=HIDDEN),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
    )
    return build(hf.PaliGemmaForConditionalGeneration, config)


def _paligemma1() -> Any:
    return _paligemma("gemma")


def _paligemma2() -> Any:
    return _paligemma("gemma2")


def _paligemma_image(n: int) -> Piece:
    return Piece((IMAGE,) * 25, {"pixel_values": noise(n, 1, 3, 35, 35)})


def _prefix(ids: Tensor, _: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"token_type_ids": torch.zeros_like(ids)}


SHARED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
PATCHES = 64  # gemma4 pads every image to this many patches; a token covers 2x2
EARS = 16  # mel bins
# Since transformers 5.2x the frames of all videos stand in one row, with their counts beside them.
FLAT_VIDEOS = "num_frames_per_video" in inspect.signature(hf.Gemma4Model.forward).parameters


def _gemma4() -> Any:
    text = llama_text(num_hidden_layers=len(SHARED), layer_types=list(SHARED), num_kv_shared_layers=2)
    text |= dict(vocab_size_per_layer_input=VOCAB, global_head_dim=16, sliding_window=512)
    text |= dict(hidden_size_per_layer_input=8, use_bidirectional_attention="vision")
    text.pop("model_type")
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    eyes |= dict(num_key_value_heads=4, pooling_kernel_size=2, patch_size=4, position_embedding_size=PATCHES)
    ears = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, subsampling_conv_channels=(EARS, 4))
    config = hf.Gemma4Config(
        text_config=text,
        vision_config=eyes,
        audio_config=ears | dict(output_proj_dims=HIDDEN),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
    )
    model = build(hf.Gemma4ForConditionalGeneration, config)
    # Scores are not divided by the root of the head size; with random keys, rounding would then grow to more than 1e-5.
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_norm.weight.fill_(0.25)
    return model


def _patches(seed: int, pictures: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pixels and (x, y) positions of pictures of height x width patches, padded with zeros and with -1."""
    used = height * width
    pixels = noise(seed, pictures, PATCHES, 48).sigmoid()
    pixels[:, used:] = 0
    where = torch.full((pictures, PATCHES, 2), -1)
    where[:, :used, 0] = torch.arange(used) % width
    where[:, :used, 1] = torch.arange(used) // width
    return pixels, where


def _gemma4_image(n: int) -> Piece:
    height, width = ((8, 8), (6, 8), (10, 6))[n % 3]
    pixels, where = _patches(n, 1, height, width)
    ids = (START, *(IMAGE,) * (height * width // 4), END)
    return Piece(ids, {"pixel_values": pixels, "image_position_ids": where})


def _gemma4_video(n: int) -> Piece:
    """Return a video of 3, 2 or 4 frames of 2x4 tokens, each behind its time stamp."""
    frames = (3, 2, 4)[n % 3] if FLAT_VIDEOS else 3
    pixels, where = _patches(50 + n, frames, 4, 8)
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, START, *(VIDEO,) * 8, END)
    if not FLAT_VIDEOS:
        return Piece(ids, {"pixel_values_videos": pixels[None], "video_position_ids": where[None]})
    counts = torch.tensor([frames])
    return Piece(ids, {"pixel_values_videos": pixels, "video_position_ids": where, "num_frames_per_video": counts})


def _gemma4_audio(n: int) -> Piece:
    tokens = (16, 9, 12)[n % 3]
    mask = torch.ones(1, 4 * tokens, dtype=torch.bool)
    arrays = {"input_features": noise(80 + n, 1, 4 * tokens, EARS), "input_features_mask": mask}
    return Piece((AUDIO,) * tokens, arrays)


def _gemma4_unified() -> Any:
    text = llama_text(num_hidden_layers=len(SHARED), layer_types=list(SHARED), sliding_window=512, global_head_dim=16)
    text.pop("model_type")
    eyes = dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32)
    config = hf.Gemma4UnifiedConfig(
        text_config=text,
        vision_config=eyes,
        audio_config=dict(audio_embed_dim=EARS),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
    )
    model = build(hf.Gemma4UnifiedForConditionalGeneration, config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_norm.weight.fill_(0.25)
    return model


def _unified_image(n: int) -> Piece:
    """Return an image of which each patch is a token."""
    height, width = ((4, 4), (3, 6), (6, 4))[n % 3]
    pixels, where = _patches(n, 1, height, width)
    return Piece((START, *(IMAGE,) * (height * width), END), {"pixel_values": pixels, "image_position_ids": where})


def _unified_video(n: int) -> Piece:
    frames = (3, 2, 4)[n % 3]
    pixels, where = _patches(50 + n, frames, 2, 4)
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, START, *(VIDEO,) * 8, END)
    counts = torch.tensor([frames])
    return Piece(ids, {"pixel_values_videos": pixels, "video_position_ids": where, "num_frames_per_video": counts})


def _unified_audio(n: int) -> Piece:
    """Return a sound of which each frame is a token."""
    tokens = (16, 9, 12)[n % 3]
    mask = torch.ones(1, tokens, dtype=torch.bool)
    return Piece((AUDIO,) * tokens, {"input_features": noise(80 + n, 1, tokens, EARS), "input_features_mask": mask})


def _gemma3n() -> Any:
    text = llama_text(num_hidden_layers=len(SHARED), layer_types=list(SHARED), num_kv_shared_layers=2)
    text |= dict(vocab_size_per_layer_input=140, sliding_window=512, hidden_size_per_layer_input=8, laurel_rank=8)
    text |= dict(altup_num_inputs=2, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    text.pop("model_type")
    ears = dict(hidden_size=32, input_feat_size=EARS, conf_num_hidden_layers=2, conf_num_attention_heads=4)
    ears |= dict(vocab_size=10, vocab_offset=150, sscp_conv_channel_size=(8, 4))
    # A small convolutional tower stands for MobileNetV5, which has one size only.
    eyes = dict(architecture="test_resnet", hidden_size=96, vocab_size=10, vocab_offset=140, model_args={"in_chans": 3})
    config = hf.Gemma3nConfig(
        text_config=text,
        vision_config=eyes,
        audio_config=ears,
        vision_soft_tokens_per_image=16,
        audio_soft_tokens_per_image=12,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
    )
    return build(hf.Gemma3nForConditionalGeneration, config)


def _gemma3n_image(n: int) -> Piece:
    return Piece((START, *(IMAGE,) * 16, END), {"pixel_values": noise(n, 1, 3, 128, 128)})


def _gemma3n_audio(n: int) -> Piece:
    """Return a sound of any length; it always gets 12 tokens, the last of them padding."""
    frames = (160, 96, 128)[n % 3]
    mask = torch.ones(1, frames, dtype=torch.bool)
    return Piece((AUDIO,) * 12, {"input_features": noise(80 + n, 1, frames, EARS), "input_features_mask": mask})


GEMMA_LINE = {
    "gemma3": Family(_gemma3, _gemma3_image, visual_ids=(IMAGE,), derived=_image_types, types_from_start=True),
    "gemma3_window": Family(
        _gemma3_window, _gemma3_image, visual_ids=(IMAGE,), derived=_image_types, types_from_start=True
    ),
    "shieldgemma2": Family(
        _shieldgemma2, _gemma3_image, visual_ids=(IMAGE,), derived=_image_types, types_from_start=True
    ),
    "paligemma": Family(_paligemma1, _paligemma_image, visual_ids=(IMAGE,), derived=_prefix, before=()),
    "paligemma2": Family(_paligemma2, _paligemma_image, visual_ids=(IMAGE,), derived=_prefix, before=()),
    "gemma4": Family(
        _gemma4,
        _gemma4_image,
        _gemma4_video,
        visual_ids=(IMAGE, VIDEO, AUDIO),
        token_types=True,
        audio=_gemma4_audio,
        types_from_start=True,
    ),
    "gemma4_unified": Family(
        _gemma4_unified,
        _unified_image,
        _unified_video,
        visual_ids=(IMAGE, VIDEO, AUDIO),
        token_types=True,
        audio=_unified_audio,
        types_from_start=True,
        wants="Gemma4UnifiedForConditionalGeneration",
    ),
    "gemma3n": Family(_gemma3n, _gemma3n_image, visual_ids=(IMAGE, AUDIO), audio=_gemma3n_audio, modules=("timm",)),
}
