"""Tiny models with a Pixtral tower: images keep their own height and width, and each row of tokens ends in a break."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.parts import END, IMAGE, Family, Piece, build, llama_text, noise, qwen2_text

ROW_BREAK = 107
GRIDS = ((4, 5), (3, 6), (6, 4))  # rows and columns of tokens


def vision(patch: int, side: int) -> dict[str, Any]:
    """Return the config of a Pixtral tower."""
    base = dict(model_type="pixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return base | dict(image_size=side, patch_size=patch)


def _text() -> dict[str, Any]:
    return llama_text(model_type="mistral", sliding_window=None)


def broken_rows(rows: int, columns: int) -> tuple[int, ...]:
    """Return the ids of an image: a break behind each row, an end behind the last."""
    return (*((*(IMAGE,) * columns, ROW_BREAK) * (rows - 1)), *(IMAGE,) * columns, END)


def row_image(n: int) -> Piece:
    """Return an image of any shape."""
    rows, columns = GRIDS[n % len(GRIDS)]
    height, width = rows * 14, columns * 14
    arrays = {"pixel_values": noise(n, 1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}
    return Piece(broken_rows(rows, columns), arrays)


def _pixtral() -> Any:
    config = hf.LlavaConfig(
        vision_config=vision(14, 84),
        text_config=_text(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return build(hf.LlavaForConditionalGeneration, config)


def _mistral3() -> Any:
    config = hf.Mistral3Config(
        vision_config=vision(7, 84),
        text_config=_text(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    return build(hf.Mistral3ForConditionalGeneration, config)


def _mistral4() -> Any:
    text = llama_text(model_type="mistral4", num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4)
    text |= dict(num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
    text.pop("head_dim")
    config = hf.Mistral3Config(
        vision_config=vision(7, 84),
        text_config=text | dict(v_head_dim=8),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    return build(hf.Mistral3ForConditionalGeneration, config)


def _lighton_ocr() -> Any:
    config = hf.LightOnOcrConfig(
        vision_config=vision(7, 84),
        text_config=qwen2_text(model_type="qwen3"),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return build(hf.LightOnOcrForConditionalGeneration, config)


MISTRAL_LINE = {
    "pixtral": Family(_pixtral, row_image),
    "mistral3": Family(_mistral3, row_image),
    "mistral4": Family(_mistral4, row_image, wants="Mistral4ForCausalLM"),
    "lighton_ocr": Family(
        _lighton_ocr,
        row_image,
        visual_ids=(IMAGE,),
        tower="model.vision_encoder",
        wants="LightOnOcrForConditionalGeneration",
    ),
}
