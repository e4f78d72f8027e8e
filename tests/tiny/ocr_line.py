"""Tiny models that read documents: their pictures are most of the prompt."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.glm_line import glm_config, glm_family
from tiny.idefics_line import TILE, tile_arrays, tiled_ids
from tiny.misc_line import minicpm, minicpm_image, minicpm_video
from tiny.moe_line import IMAGE_GRIDS, image_tokens
from tiny.parts import END, HIDDEN, IMAGE, START, VIDEO, Family, Piece, build, llama_text, mrope_text, noise, qwen2_text

# A SAM encoder of 4-pixel patches: windows of 3 patches in its first layer, all of the picture in the second.
SAM: dict[str, Any] = dict(
    hidden_size=32,
    output_channels=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=64,
    patch_size=4,
    window_size=3,
    global_attn_indexes=[1],
    mlp_dim=64,
)


def _got(config: Any) -> Any:
    made = config(vision_config=dict(SAM), text_config=qwen2_text(), image_token_index=IMAGE, image_seq_length=16)
    return build(hf.GotOcr2ForConditionalGeneration, made)


def _got_ocr2() -> Any:
    return _got(hf.GotOcr2Config)


def _pp_chart2table() -> Any:
    return _got(hf.PPChart2TableConfig)


def _got_image(n: int) -> Piece:
    """Return a page of 16x16 patches, 4x4 tokens, or two of them as crops of one page."""
    crops = 2 if n % 3 == 2 else 1
    return Piece((START, *(IMAGE,) * (16 * crops), END), {"pixel_values": noise(n, crops, 3, 64, 64)})


def _glm_ocr() -> Any:
    config = glm_config(hf.GlmOcrConfig, {"head_dim": 16}, {"in_channels": 3})
    return build(hf.GlmOcrForConditionalGeneration, config)


def _paddleocr_vl() -> Any:
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=112)
    config = hf.PaddleOCRVLConfig(
        text_config=mrope_text(head_dim=16),
        vision_config=eyes | dict(patch_size=14, spatial_merge_size=2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return build(hf.PaddleOCRVLForConditionalGeneration, config)


def _paddle_image(n: int) -> Piece:
    grid = IMAGE_GRIDS[n % len(IMAGE_GRIDS)]
    arrays = {
        "pixel_values": noise(n, grid[1] * grid[2], 3, 14, 14),
        "image_grid_thw": torch.tensor([grid]),
    }
    return Piece((START, *(IMAGE,) * image_tokens(n), END), arrays)


def _minicpm_ocr() -> Any:
    return minicpm(hf.MiniCPMOcrConfig, hf.MiniCPMOcrForConditionalGeneration)


def _qianfan_ocr() -> Any:
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, drop_path_rate=0.0)
    config = hf.QianfanOCRConfig(
        vision_config=eyes | dict(image_size=56, patch_size=7),
        text_config=llama_text(model_type="qwen3"),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return build(hf.QianfanOCRForConditionalGeneration, config)


def _qianfan_image(n: int) -> Piece:
    """Return a page of 1 to 3 tiles of 4x4 tokens, one behind the other."""
    tiles = (1, 3, 2)[n % 3]
    return Piece((START, *(IMAGE,) * (16 * tiles), END), {"pixel_values": noise(n, tiles, 3, 56, 56)})


def _granite_docling() -> Any:
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=TILE)
    text = llama_text(embedding_multiplier=2.0, attention_multiplier=0.25, residual_multiplier=0.5, logits_scaling=1.0)
    text.pop("model_type")
    config = hf.GraniteDoclingConfig(
        vision_config=eyes
        | dict(patch_size=7, out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0, 1]),
        text_config=text,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(hf.GraniteDoclingForConditionalGeneration, config)


def _docling_image(n: int) -> Piece:
    """Return a page of rows of tiles with 2x2 tokens each, the small whole page last."""
    ids, tiles = tiled_ids(n)
    arrays = tile_arrays(n, tiles)
    return Piece(ids, arrays | {"pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool)})


# Hard-wired in the model: the queries of a picture with at most 144 patches.
DEEPSEEK_QUERIES = 144


def _deepseek_ocr2() -> Any:
    text = llama_text(num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1)
    text |= dict(num_experts_per_tok=2, n_group=1, topk_group=1, topk_method="greedy")
    text |= dict(mlp_layer_types=["dense", *["sparse"] * 3])
    text.pop("model_type")
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=8)
    config = hf.DeepseekOcr2Config(
        vision_config=dict(
            sam_config=dict(SAM, downsample_channels=[24, 32]), encoder_config=eyes | dict(num_key_value_heads=4)
        ),
        text_config=text,
        image_token_id=IMAGE,
    )
    return build(hf.DeepseekOcr2ForConditionalGeneration, config)


def _deepseek_image(n: int) -> Piece:
    """Return a page with a separator behind it; some have two crops in front."""
    crops = 2 if n % 3 == 2 else 0
    arrays = {"pixel_values": noise(n, 1, 3, 64, 64), "num_local_patches": torch.tensor([crops])}
    if crops:
        arrays["pixel_values_local"] = noise(40 + n, crops, 3, 64, 64)
    return Piece((IMAGE,) * (DEEPSEEK_QUERIES * (crops + 1) + 1), arrays)


def _plain(model: Any, image: Any, wants: str, **more: Any) -> Family:
    return Family(model, image, visual_ids=(IMAGE,), wants=wants, **more)


OCR_LINE = {
    "got_ocr2": _plain(_got_ocr2, _got_image, "GotOcr2ForConditionalGeneration"),
    "pp_chart2table": _plain(_pp_chart2table, _got_image, "PPChart2TableConfig"),
    "glm_ocr": glm_family(_glm_ocr, wants="GlmOcrForConditionalGeneration"),
    "paddleocr_vl": _plain(
        _paddleocr_vl, _paddle_image, "PaddleOCRVLForConditionalGeneration", tower="model.visual", token_types=True
    ),
    "minicpm_ocr": Family(
        _minicpm_ocr,
        minicpm_image,
        minicpm_video,
        packed=("pixel_values", "pixel_values_videos"),
        wants="MiniCPMOcrForConditionalGeneration",
    ),
    "qianfan_ocr": _plain(_qianfan_ocr, _qianfan_image, "QianfanOCRForConditionalGeneration"),
    "granite_docling": _plain(
        _granite_docling,
        _docling_image,
        "GraniteDoclingForConditionalGeneration",
        tower="model.vision_model",
        per_sample=("pixel_values", "pixel_attention_mask"),
    ),
    "deepseek_ocr2": _plain(_deepseek_ocr2, _deepseek_image, "DeepseekOcr2ForConditionalGeneration"),
}
