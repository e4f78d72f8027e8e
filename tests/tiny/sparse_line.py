"""Tiny models of the families whose released text models do not let each token see all others.

Where the config can also ask for plain layers, there is a model of these, and one beside it as released.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.grid_line import PACKED, ROPE, grid_image, grid_video, one_frame
from tiny.mistral_line import row_image, vision
from tiny.moe_line import AUDIO_END, AUDIO_START, IDS, hybrid_text
from tiny.parts import AUDIO, END, HIDDEN, IMAGE, LAYERS, START, VIDEO, Family, Piece, build, llama_text, noise

EXPERTS: dict[str, Any] = dict(moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
LATENT: dict[str, Any] = dict(kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
INDEXER: dict[str, Any] = dict(index_topk=512, index_head_dim=16, index_n_heads=2)


def _image(n: int) -> Piece:
    return grid_image(n, 14)


def _video(n: int) -> Piece:
    return grid_video(n, 14)


def _still_image(n: int) -> Piece:
    return one_frame(grid_image(n, 14))


def _still_video(n: int) -> Piece:
    return one_frame(grid_video(n, 14))


def _text(**changes: Any) -> dict[str, Any]:
    text = llama_text(num_key_value_heads=4) | changes
    text.pop("model_type")
    return text


def _eyes(**changes: Any) -> dict[str, Any]:
    base = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=14)
    return base | changes


def _minimax(types: list[str]) -> Any:
    text = _text(num_experts_per_tok=2, num_local_experts=4, dense_intermediate_size=96, shared_intermediate_size=32)
    text |= dict(layer_types=types, mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)], intermediate_size=32)
    text |= dict(rotary_dim=8, index_head_dim=16, index_n_heads=2, index_block_size=8, index_topk_blocks=64)
    config = hf.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=_eyes(image_size=112),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=48,
    )
    return build(hf.MiniMaxM3SparseForConditionalGeneration, config)


def _minimax_full() -> Any:
    return _minimax(["full_attention"] * LAYERS)


def _minimax_sparse() -> Any:
    return _minimax(["full_attention", *["minimax_m3_sparse"] * (LAYERS - 1)])


def _dots3_note(use_dsa: bool) -> Any:
    text = _text(**EXPERTS, **LATENT, **INDEXER, head_dim=16, use_dsa=use_dsa, sliding_window=512)
    text |= dict(layer_types=["full_attention", "sliding_attention"] * (LAYERS // 2), num_attention_heads=4)
    text |= dict(shared_experts_intermediate_size=32, swa_num_attention_heads=2, swa_num_key_value_heads=2)
    text |= dict(swa_kv_lora_rank=16, swa_q_lora_rank=16, swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=8)
    eyes = _eyes(adapter_in_dim=32, adapter_out_dim=HIDDEN, mlp_layer_types=["dense", "dense", "sparse"])
    ears = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, feature_size=16)
    ears |= dict(downsample_hidden_size=8, adapter_input_size=32, adapter_out_dim=HIDDEN)
    config = hf.Dots3NoteConfig(
        text_config=text,
        vision_config=eyes | dict(moe_intermediate_size=32, num_local_experts=4),
        audio_config=ears,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    return build(hf.Dots3NoteForConditionalGeneration, config)


def _dots3_note_full() -> Any:
    return _dots3_note(use_dsa=False)


def _dots3_note_indexed() -> Any:
    return _dots3_note(use_dsa=True)


def _dots3_audio(n: int) -> Piece:
    """Return a sound of one chunk; each token stands for 8 frames of 160 samples."""
    tokens = (20, 12, 16)[n % 3]
    arrays = {
        "input_features": noise(80 + n, 1, 16, 8 * tokens),
        "chunk_sample_lengths": torch.tensor([8 * 160 * tokens]),
    }
    return Piece((AUDIO_START, *(AUDIO,) * tokens, AUDIO_END), arrays)


def _qwen4_exp() -> Any:
    text = hybrid_text(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, hc_count=2, hc_lowrank=8)
    text |= dict(shared_expert_intermediate_size=32, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16)
    vision = PACKED | dict(patch_size=16, out_hidden_size=HIDDEN, intermediate_size=64, num_position_embeddings=16)
    config = hf.Qwen4ExpConfig(
        text_config=text | dict(indexer_budget=512, indexer_compress_ratio=4), vision_config=vision, **IDS
    )
    return build(hf.Qwen4ExpForConditionalGeneration, config, std=0.05)


def _glm5_next() -> Any:
    text = _text(**EXPERTS, **LATENT, **INDEXER, index_kpool=4, linear_head_dim=16, linear_num_heads=4, hc_mult=2)
    text |= dict(qk_rope_head_dim=0, layer_types=["linear_attention", "indexed_attention"] * (LAYERS // 2))
    text |= dict(mlp_layer_types=["dense"] * LAYERS)
    vision = PACKED | dict(patch_size=14, out_hidden_size=HIDDEN, intermediate_size=64, image_size=112)
    config = hf.Glm5NextConfig(
        text_config=text,
        vision_config=vision | dict(projection_intermediate_size=48),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
    )
    return build(hf.Glm5NextForConditionalGeneration, config, std=0.05)


def _mistral_large4() -> Any:
    text = _text(**EXPERTS, **LATENT, **INDEXER)
    text.pop("q_lora_rank")
    config = hf.MistralLarge4Config(
        text_config=text, vision_config=vision(7, 84), image_token_index=IMAGE, spatial_merge_size=2
    )
    return build(hf.MistralLarge4ForConditionalGeneration, config)


def _hy_v4_vl() -> Any:
    text = _text(**EXPERTS, **LATENT, **INDEXER, hc_mult=2, rope_parameters=ROPE | {"mrope_section": [2, 1, 1]})
    config = hf.HYV4VLConfig(
        text_config=text,
        vision_config=_eyes(out_hidden_size=HIDDEN, max_image_size=112),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return build(hf.HYV4VLForConditionalGeneration, config)


def _inkling_text(**changes: Any) -> dict[str, Any]:
    text = _text(layer_types=["hybrid_sliding", "hybrid"] * (LAYERS // 2), sliding_window_size=512)
    text |= dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, d_rel=4, rel_extent=16)
    text |= dict(n_routed_experts=4, num_experts_per_tok=2, unpadded_vocab_size=160)
    return text | dict(moe_intermediate_size=32) | changes


def _inkling() -> Any:
    text = _inkling_text(mlp_layer_types=["dense"] * LAYERS)
    config = hf.InklingConfig(
        text_config=text,
        vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=40),
        audio_config=dict(n_mel_bins=16, mel_vocab_size=16),
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
    )
    return build(hf.InklingForConditionalGeneration, config)


def _inkling2(config: Any, model: Any, **changes: Any) -> Any:
    eyes = _eyes(patch_size=20, posemb_grid_size=4, projection_hidden_dim=48, text_hidden_size=HIDDEN)
    text = _inkling_text(n_layers_per_attn_res_block=2, **changes)
    text.pop("intermediate_size")
    made = config(text_config=text, vision_config=eyes | dict(model_type="inkling2_vision"), image_token_id=IMAGE)
    return build(model, made)


def _inkling2_plain() -> Any:
    return _inkling2(hf.Inkling2Config, hf.Inkling2ForConditionalGeneration)


def _inkling2_loop() -> Any:
    loop = dict(loop_layer_index_start=2, loop_layer_index_end=4, loop_num_passes=2, loop_gate_rank=8)
    return _inkling2(hf.Inkling2LoopConfig, hf.Inkling2LoopForConditionalGeneration, **loop)


def _inkling_image(n: int) -> Piece:
    """Return an image of patches of two frames that are a token each."""
    tokens = (16, 20, 18)[n % 3]
    return Piece((START, *(IMAGE,) * tokens, END), {"pixel_values": noise(n, tokens, 2, 40, 40, 3)})


def _inkling2_image(n: int) -> Piece:
    """Return an image of squares of 2x2 patches that are a token each."""
    height, width = ((4, 4), (3, 6), (6, 4))[n % 3]
    arrays = {
        "pixel_values": noise(n, height * width, 40, 40, 3),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
    return Piece((START, *(IMAGE,) * (height * width), END), arrays)


def _hy_image(n: int) -> Piece:
    return _with_row_ends(_still_image(n), "image", IMAGE)


def _hy_video(n: int) -> Piece:
    return _with_row_ends(_still_video(n), "video", VIDEO)


def _with_row_ends(piece: Piece, modality: str, token: int) -> Piece:
    """Return a piece with a token of its own behind each row."""
    frames, height, width = piece.arrays[f"{modality}_grid_thw"][0].tolist()
    return Piece((START, *(token,) * (frames * height // 2 * (width // 2 + 1)), END), piece.arrays)


def _qwen_image(n: int) -> Piece:
    return grid_image(n, 16)


SPARSE_LINE = {
    "minimax_m3_vl": Family(_minimax_full, _image, _video, wants="MiniMaxM3SparseForConditionalGeneration"),
    "minimax_m3_vl_sparse": Family(_minimax_sparse, _image, _video, wants="MiniMaxM3SparseForConditionalGeneration"),
    "dots3_note": Family(
        _dots3_note_full,
        _still_image,
        _still_video,
        visual_ids=(IMAGE, VIDEO, AUDIO),
        audio=_dots3_audio,
        wants="Dots3NoteForConditionalGeneration",
    ),
    "dots3_note_indexed": Family(
        _dots3_note_indexed, _still_image, visual_ids=(IMAGE,), wants="Dots3NoteForConditionalGeneration"
    ),
    "qwen4_exp": Family(
        _qwen4_exp,
        _qwen_image,
        visual_ids=(IMAGE,),
        token_types=True,
        tower="model.visual",
        wants="Qwen4ExpForConditionalGeneration",
    ),
    "glm5_next": Family(
        _glm5_next, _image, visual_ids=(IMAGE,), tower="model.visual", wants="Glm5NextForConditionalGeneration"
    ),
    "mistral_large4": Family(
        _mistral_large4, row_image, visual_ids=(IMAGE,), wants="MistralLarge4ForConditionalGeneration"
    ),
    "hy_v4_vl": Family(_hy_v4_vl, _hy_image, _hy_video, token_types=True, wants="HYV4VLForConditionalGeneration"),
    "inkling_mm_model": Family(
        _inkling,
        _inkling_image,
        visual_ids=(IMAGE,),
        wants="InklingForConditionalGeneration",
        modules=("scipy",),
    ),
    "inkling2": Family(_inkling2_plain, _inkling2_image, visual_ids=(IMAGE,), wants="Inkling2ForConditionalGeneration"),
    "inkling2_loop": Family(
        _inkling2_loop, _inkling2_image, visual_ids=(IMAGE,), wants="Inkling2LoopForConditionalGeneration"
    ),
}
