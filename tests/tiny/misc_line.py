"""Tiny models that are each a case of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tiny.llava_line import ANYRES_TOKENS
from tiny.moe_line import hybrid_text
from tiny.parts import END, HIDDEN, IMAGE, START, VIDEO, Family, Piece, build, llama_text, noise, qwen2_text
from tiny.plain_line import siglip

BREAK, SLICE_START, SLICE_END = 107, 108, 109
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _kimi_k25() -> Any:
    text = llama_text(model_type="deepseek_v3", num_key_value_heads=4, rope_parameters=dict(ROPE))
    text |= dict(moe_intermediate_size=32, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1)
    text |= dict(topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    text |= dict(first_k_dense_replace=1, num_nextn_predict_layers=0)
    text.pop("head_dim")
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=14)
    config = hf.Kimi_K25Config(
        text_config=text,
        vision_config=eyes | dict(pos_emb_height=8, pos_emb_width=8, pos_emb_time=4),
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return build(hf.Kimi_K25ForConditionalGeneration, config)


def _kimi_image(n: int) -> Piece:
    height, width = ((8, 8), (6, 10), (12, 8))[n % 3]
    arrays = {
        "pixel_values": noise(n, height * width, 3, 14, 14),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
    return Piece((START, *(IMAGE,) * (height * width // 4), END), arrays)


def _kimi_video(n: int) -> Piece:
    """Return a video of chunks of one frame: the library cannot split chunks of more, as it counts merged frames."""
    chunks = (4, 3, 5)[n % 3]
    ids: tuple[int, ...] = ()
    for chunk in range(chunks):
        ids += (20 + chunk, START, *(VIDEO,) * 4, END)
    arrays = {
        "pixel_values_videos": noise(50 + n, chunks * 16, 3, 14, 14),
        "video_grid_thw": torch.tensor([[1, 4, 4]] * chunks),
    }
    return Piece(ids, arrays)


LOW_START, FRAME_START, FRAME_END = 140, 141, 142
SIDE = 8  # patches of a crop along each side; a token pools 2x2 of them


def _molmo2() -> Any:
    text = llama_text(additional_vocab_size=32, rope_parameters=dict(ROPE))
    text.pop("model_type")
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=8)
    adapter = dict(vision_feature_layer=[2, 1], hidden_size=32, num_attention_heads=4, num_key_value_heads=4)
    config = hf.Molmo2Config(
        text_config=text,
        vision_config=eyes | dict(num_key_value_heads=4, image_size=[112, 112], patch_size=14),
        adapter_config=adapter | dict(head_dim=8, intermediate_size=64, text_hidden_size=HIDDEN),
        image_patch_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
        low_res_image_start_token_id=LOW_START,
        frame_start_token_id=FRAME_START,
        frame_end_token_id=FRAME_END,
    )
    return build(hf.Molmo2ForConditionalGeneration, config)


def _pool(crops: list[int], height: int) -> Tensor:
    """Return the 2x2 patches of each token of these crops, laid side by side; rows from the top."""
    grid = torch.cat([crop * SIDE * SIDE + torch.arange(SIDE * SIDE).view(SIDE, SIDE) for crop in crops], 1)[:height]
    return grid.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)


def _molmo2_rows(rows: int, columns: int) -> tuple[int, ...]:
    return (*(IMAGE,) * columns, BREAK) * rows


def _molmo2_image(n: int) -> Piece:
    """Return the small whole picture, then one or two crops side by side; each row of tokens ends in a break."""
    high = (1, 2, 1)[n % 3]
    rows = (4, 4, 3)[n % 3]
    ids = (LOW_START, *_molmo2_rows(4, 4), END, START, *_molmo2_rows(rows, 4 * high), END)
    arrays = {
        "pixel_values": noise(n, 1 + high, SIDE * SIDE, 3 * 14 * 14),
        "image_grids": torch.tensor([[4, 4, rows, 4 * high]]),
        "image_num_crops": torch.tensor([1 + high]),
    }
    return Piece(ids, arrays)


def _molmo2_video(n: int) -> Piece:
    frames = (2, 3, 1)[n % 3]
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, FRAME_START, *(IMAGE,) * 16, FRAME_END)
    arrays = {
        "pixel_values_videos": noise(50 + n, frames, SIDE * SIDE, 3 * 14 * 14),
        "video_grids": torch.tensor([[frames, 4, 4]]),
    }
    return Piece(ids, arrays)


def _molmo2_derived(ids: Tensor, arrays: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the types of the tokens and which patches each of them pools, counted over all crops of the batch."""
    out = {"mm_token_type_ids": (ids == IMAGE).long()}
    if "image_grids" in arrays:
        pools, crop = [], 0
        for (_, _, rows, _), crops in zip(
            arrays["image_grids"].tolist(), arrays["image_num_crops"].tolist(), strict=True
        ):
            pools += [_pool([crop], SIDE), _pool(list(range(crop + 1, crop + crops)), 2 * rows)]
            crop += crops
        out["image_token_pooling"] = torch.cat(pools)
    if "video_grids" in arrays:
        frames = int(arrays["video_grids"][:, 0].sum())
        out["video_token_pooling"] = torch.cat([_pool([frame], SIDE) for frame in range(frames)])
    return out


def minicpm(config: Any, model: Any) -> Any:
    """Return a MiniCPM-V model: a tower that joins patches on its way, and recurrent text layers."""
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=112)
    eyes |= dict(patch_size=14)
    extra = {}
    if model is getattr(hf, "MiniCPMV4_7ForConditionalGeneration", None):
        extra = dict(image_start_id=START, image_end_id=END, newline_id=BREAK)
        extra |= dict(slice_start_id=SLICE_START, slice_end_id=SLICE_END)
    made = config(
        text_config=hybrid_text(model_type="qwen3_5_text"),
        vision_config=eyes | dict(insert_layer_id=1),
        insert_layer_id=1,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        downsample_mode="16x",
        **extra,
    )
    return build(model, made, std=0.05)


def _minicpmv4_6() -> Any:
    return minicpm(hf.MiniCPMV4_6Config, hf.MiniCPMV4_6ForConditionalGeneration)


def _minicpmv4_7() -> Any:
    return minicpm(hf.MiniCPMV4_7Config, hf.MiniCPMV4_7ForConditionalGeneration)


# The first releases can merge patches of one size only.
MIXED_SIZES = hasattr(hf, "MiniCPMV4_7ForConditionalGeneration")


def minicpm_image(n: int) -> Piece:
    """Return a picture of 4x4 tokens, or of another shape, or with two slices of 2x3 tokens behind it."""
    shapes = ([(16, 16)], [(12, 20)], [(8, 12), (8, 12), (8, 12)])[n % 3 if MIXED_SIZES else 0]
    ids: tuple[int, ...] = (START, *(IMAGE,) * (shapes[0][0] * shapes[0][1] // 16), END)
    for height, width in shapes[1:]:
        ids += (SLICE_START, *(IMAGE,) * (height * width // 16), SLICE_END)
    patches = sum(height * width for height, width in shapes)
    return Piece(ids, {"pixel_values": noise(n, 1, 3, 14, 14 * patches), "target_sizes": torch.tensor(shapes)})


def minicpm_video(n: int) -> Piece:
    """Return a video of frames of 2x2 tokens."""
    frames = (4, 3, 5)[n % 3]
    ids: tuple[int, ...] = ()
    for _ in range(frames):
        ids += (START, *(VIDEO,) * 4, END)
    arrays = {
        "pixel_values_videos": noise(50 + n, 1, 3, 14, 14 * 64 * frames),
        "target_sizes_videos": torch.tensor([[8, 8]] * frames),
    }
    return Piece(ids, arrays)


GRANITE_SIZES = ((56, 112), (112, 56), (112, 112))


def _granite4_vision() -> Any:
    text = llama_text(attention_multiplier=0.25, embedding_multiplier=2.0)
    text["model_type"] = "granite4_vision_text"
    queries = dict(model_type="blip_2_qformer", num_hidden_layers=1, intermediate_size=64, cross_attention_frequency=1)
    text.pop("head_dim")
    config = hf.Granite4VisionConfig(
        vision_config=siglip(56, hidden_size=64),
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=[list(size) for size in GRANITE_SIZES],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_vision_layer=-1,
        spatial_target_layers=[1, 2],
        qformer_config=queries | dict(hidden_size=64, encoder_hidden_size=64, num_attention_heads=1),
    )
    return build(hf.Granite4VisionForConditionalGeneration, config)


def _granite4_image(n: int) -> Piece:
    shape = n % 3
    arrays = {
        "pixel_values": noise(n, 1, (3, 3, 5)[shape], 3, 56, 56),
        "image_sizes": torch.tensor([GRANITE_SIZES[shape]]),
    }
    return Piece((IMAGE,) * ANYRES_TOKENS[shape], arrays)


def _perception_lm() -> Any:
    size = dict(embed_dim=32, depth=2, num_heads=4, img_size=[32, 32], patch_size=8)
    eyes = dict(model_type="timm_wrapper", architecture="vit_pe_core_tiny_patch16_384", model_args=size)
    config = hf.PerceptionLMConfig(
        vision_config=eyes,
        text_config=llama_text(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=1,
        vision_use_cls_token=True,
    )
    return build(hf.PerceptionLMForConditionalGeneration, config)


def _perception_image(n: int) -> Piece:
    tiles = (1, 3, 2)[n % 3]
    return Piece((IMAGE,) * (16 * tiles), {"pixel_values": noise(n, tiles, 1, 3, 32, 32)})


def _perception_video(n: int) -> Piece:
    frames = (3, 2, 4)[n % 3]
    return Piece((VIDEO,) * (16 * frames), {"pixel_values_videos": noise(50 + n, frames, 1, 3, 32, 32)})


def _fast_vlm() -> Any:
    size = dict(layers=[1, 1, 1, 1], embed_dims=[8, 16, 16, 32], mlp_ratios=[2, 2, 2, 2], inference_mode=True)
    eyes = dict(model_type="timm_wrapper", architecture="fastvit_mci0", hidden_size=64, do_pooling=True)
    config = hf.FastVlmConfig(
        vision_config=eyes | dict(model_args=size), text_config=qwen2_text(), image_token_index=IMAGE
    )
    model = build(hf.FastVlmForConditionalGeneration, config)
    # Convolutions without norms between them: smaller kernels would leave nothing of the picture.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for weight in model.model.vision_tower.parameters():
            if weight.ndim == 4:
                nn.init.kaiming_normal_(weight)
    return model


def _fast_image(n: int) -> Piece:
    return Piece((IMAGE,) * 16, {"pixel_values": noise(n, 1, 3, 128, 128)})


_TIMM = ("timm", "torchvision")
MISC_LINE = {
    "kimi_k25": Family(_kimi_k25, _kimi_image, _kimi_video),
    "molmo2": Family(
        _molmo2,
        _molmo2_image,
        _molmo2_video,
        visual_ids=(IMAGE,),
        derived=_molmo2_derived,
        types_from_start=True,
        lacks=("image_video",),
        wants="Molmo2ForConditionalGeneration",
    ),
    "minicpmv4_6": Family(_minicpmv4_6, minicpm_image, minicpm_video, packed=("pixel_values", "pixel_values_videos")),
    "minicpmv4_7": Family(
        _minicpmv4_7,
        minicpm_image,
        minicpm_video,
        token_types=True,
        packed=("pixel_values", "pixel_values_videos"),
        wants="MiniCPMV4_7ForConditionalGeneration",
    ),
    "granite4_vision": Family(_granite4_vision, _granite4_image, visual_ids=(IMAGE,)),
    "perception_lm": Family(_perception_lm, _perception_image, _perception_video, modules=_TIMM),
    "fast_vlm": Family(_fast_vlm, _fast_image, visual_ids=(IMAGE,), modules=_TIMM),
}
