"""How tower tokens become LLM tokens: the same way, walked by scores and keys instead of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream import configs, functions
from mllm_squeeze.upstream.prompts import VIDEO_PIXELS


def to_llm_tokens(
    parts: ModelParts,
    modality: str,
    inputs: Mapping[str, Any],
    lengths: Sequence[int],
    values: Tensor,
    fill: float,
) -> list[Tensor]:
    """Carry per-tower-token values to the LLM tokens of each feature item.

    values: float32 (tiles, N, C) of a batched tower, or (sum, C) of a packed one, without CLS. inputs: arguments of the
    family's feature method. lengths: LLM tokens of each item. fill: value of separators, which no tower token stands
    for. Returns one (length, C) tensor per item.

    Raises:
        UnsupportedModelError: the family's features take a way that is not known, or the lengths do not fit.
    """
    way = parts.row.tower_to_llm
    if way == "block_merge":
        items = _block_merge(parts, modality, inputs, lengths, values)
    elif way == "packed_rows":
        items = _packed_rows(parts, inputs, values)
    elif way == "anyres" and modality == "video":
        items = _pool_frames(parts, inputs, values, fill)
    elif way == "anyres":
        items = pack_anyres(parts, values, inputs, fill)
    elif way == "pool":
        items = _pool(values, lengths)
    elif way == "identity":
        items = list(values)
    else:
        items = []
    if [len(item) for item in items] != list(lengths):
        raise UnsupportedModelError(
            f"The vision encoder of '{parts.row.model_type}' gave {[len(item) for item in items]} token scores for "
            f"{modality} features of {list(lengths)} tokens. Use a method that reads nothing of the vision encoder."
        )
    return items


def require_tower_to_llm(parts: ModelParts) -> None:
    """Check that what this way needs of transformers is there.

    Raises:
        UnsupportedModelError: the order in which the encoder walks its tokens cannot be told.
    """
    if parts.row.tower_to_llm == "block_merge" and parts.tower is not None:
        functions.window_function(parts.tower, parts.config.vision_config)


def pack_anyres(parts: ModelParts, values: Tensor, inputs: Mapping[str, Any], fill: float) -> list[Tensor]:
    """Pack (tiles, N, C) values as LLaVA-NeXT packs features: overview, then the unpadded grid with row separators."""
    items = torch.split(values, tiles_per_image(parts, inputs), dim=0)
    newline = values.new_full((values.shape[-1],), fill)
    return functions.pack_tiles(parts.base, parts.config, items, inputs, newline)


def tiles_per_image(parts: ModelParts, inputs: Mapping[str, Any]) -> list[int]:
    """Return the number of tower tiles of each image of an anyres family."""
    sizes = inputs["image_sizes"]
    counts = functions.count_tiles(parts.base, parts.config, sizes)
    per_sample = inputs.get("batch_num_images")
    if per_sample is None:
        return counts
    # A sample of several images gets each of them whole.
    tiled = [int(n) == 1 for n in per_sample for _ in range(int(n))]
    return [count if split else 1 for count, split in zip(counts, tiled, strict=True)]


def _pool_frames(parts: ModelParts, inputs: Mapping[str, Any], values: Tensor, fill: float) -> list[Tensor]:
    batch = inputs[VIDEO_PIXELS].shape[0]
    side = round(values.shape[1] ** 0.5)
    grid = values.reshape(-1, side, side, values.shape[-1]).permute(0, 3, 1, 2)
    if functions.pools_by_interpolation(parts.base):
        half = math.ceil(side / 2)
        pooled = functional.interpolate(grid, size=(half, half), mode="bilinear")
        items = pooled.flatten(2).transpose(1, 2).reshape(batch, -1, values.shape[-1])
        return list(torch.cat([items, items.new_full((batch, 1, values.shape[-1]), fill)], dim=1))
    if functions.pools_by_mean(parts.base):
        stride = configs.pool_stride(parts.config)
        grid = functional.avg_pool2d(grid, stride, stride)
    return list(grid.flatten(2).transpose(1, 2).reshape(batch, -1, values.shape[-1]))


def _block_merge(
    parts: ModelParts, modality: str, inputs: Mapping[str, Any], lengths: Sequence[int], values: Tensor
) -> list[Tensor]:
    unit = configs.tower_merge(parts.config) ** 2
    merged = values.reshape(-1, unit, values.shape[-1]).mean(1)
    if parts.tower is not None:
        order = functions.window_order(parts.tower, parts.config.vision_config, inputs[f"{modality}_grid_thw"])
        if order is not None:
            merged = merged[torch.argsort(order.to(merged.device))]
    return list(torch.split(merged, list(lengths)))


def _pool(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Mean over the square of tower tokens behind each LLM token: pixel shuffles and pools in raster order."""
    tiles, count, channels = values.shape
    side, per_tile = math.isqrt(count), sum(lengths) // tiles
    window = side // max(math.isqrt(per_tile), 1)
    grid = values.reshape(tiles, side, side, channels).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(grid, window, window).flatten(2).transpose(1, 2).reshape(-1, channels)
    return list(torch.split(pooled, list(lengths))) if len(pooled) == sum(lengths) else []


def _packed_rows(parts: ModelParts, inputs: Mapping[str, Any], values: Tensor) -> list[Tensor]:
    """Split a packed row into images, and take the mean over the square that a patch merger joins."""
    patch, merge = configs.patch_size(parts.config), configs.projector_merge(parts.config)
    items, start = [], 0
    for height, width in (torch.as_tensor(inputs["image_sizes"]) // patch).tolist():
        grid = values[start : start + height * width].reshape(1, height, width, -1).permute(0, 3, 1, 2)
        items.append(functional.avg_pool2d(grid, merge, merge).flatten(2)[0].transpose(0, 1))
        start += height * width
    return items
