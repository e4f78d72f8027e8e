"""Tiny models whose sliding layers have rotary positions, and whose full layers have other ones or none."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.grid_line import grid_image, grid_video
from tiny.moe_line import AUDIO_END, AUDIO_START
from tiny.parts import AUDIO, END, HIDDEN, IMAGE, LAYERS, START, VIDEO, Family, Piece, build, llama_text, noise

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def _image(n: int) -> Piece:
    return grid_image(n, 14)


def _video(n: int) -> Piece:
    return grid_video(n, 14)


def _muse_text(**changes: Any) -> dict[str, Any]:
    text = llama_text(sliding_window=512, layer_types=list(TYPES), rope_parameters=dict(ROPE)) | changes
    text["layer_rope_theta"] = [10000.0, 0] * (LAYERS // 2)
    text.pop("model_type")
    return text


def _muse_eyes() -> dict[str, Any]:
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=14)
    return eyes | dict(pos_emb_height=4, pos_emb_width=4, max_position_embeddings=16)


MUSE: dict[str, Any] = dict(image_token_id=IMAGE, video_token_id=VIDEO, out_hidden_size=128, projector_hidden_size=48)


def _muse_glimmer() -> Any:
    config = hf.MuseGlimmerConfig(text_config=_muse_text(), vision_config=_muse_eyes(), **MUSE)
    return build(hf.MuseGlimmerForConditionalGeneration, config)


def _muse_spark() -> Any:
    text = _muse_text(moe_intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, moe_hidden_size=32)
    ears = dict(patch_sizes=[4, 4], hidden_sizes=[16, 32], depths=[1, 1], num_hidden_layers=2, out_hidden_size=HIDDEN)
    config = hf.MuseSparkConfig(
        text_config=text, vision_config=_muse_eyes(), audio_config=ears, audio_token_id=AUDIO, **MUSE
    )
    return build(hf.MuseSparkForConditionalGeneration, config)


def _muse_audio(n: int) -> Piece:
    """Return a sound of 16 samples for each token."""
    tokens = (20, 12, 16)[n % 3]
    mask = torch.ones(1, 16 * tokens, dtype=torch.long)
    arrays = {"input_values": noise(80 + n, 1, 16 * tokens), "input_values_mask": mask}
    return Piece((AUDIO_START, *(AUDIO,) * tokens, AUDIO_END), arrays)


def _step3p7() -> Any:
    text = llama_text(sliding_window=512, layer_types=list(TYPES), moe_intermediate_size=32, n_routed_experts=4)
    text |= dict(num_experts_per_tok=2, share_expert_dim=32, mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)])
    text |= dict(num_sliding_attention_heads=8)
    text.pop("model_type")
    eyes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=112, patch_size=7, mlp_ratio=2.0)
    config = hf.Step3p7Config(
        text_config=text, vision_config=eyes | dict(max_position_embeddings=256), image_token_id=IMAGE
    )
    return build(hf.Step3p7ForConditionalGeneration, config)


def _step3p7_image(n: int) -> Piece:
    """Return an image of 4x4 tokens."""
    return Piece((START, *(IMAGE,) * 16, END), {"pixel_values": noise(n, 1, 3, 112, 112)})


MUSE_LINE = {
    "muse_glimmer": Family(_muse_glimmer, _image, _video, wants="MuseGlimmerForConditionalGeneration"),
    "muse_spark": Family(
        _muse_spark,
        _image,
        _video,
        visual_ids=(IMAGE, VIDEO, AUDIO),
        audio=_muse_audio,
        wants="MuseSparkForConditionalGeneration",
    ),
    "step3p7": Family(
        _step3p7,
        _step3p7_image,
        visual_ids=(IMAGE,),
        tower="model.vision_model",
        wants="Step3p7ForConditionalGeneration",
    ),
}
