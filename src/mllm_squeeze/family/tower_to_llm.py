"""How tower tokens become LLM tokens: the same way, walked by scores and keys instead of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family import patch_cells
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream import configs, functions
from mllm_squeeze.upstream.prompts import VIDEO_PIXELS

_WHY_NOT = {
    "queries": "each token that the LLM gets is a query that looks at all patches, so none stands for some of them",
    "overlap": "convolutions whose windows overlap make the tokens that the LLM gets, so each patch goes into several",
    "no_encoder": "patches are projected straight into the LLM, and no encoder looks at them",
}


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
    items = _carried(parts, modality, inputs, lengths, values, fill)
    if [len(item) for item in items] != list(lengths):
        raise UnsupportedModelError(
            f"The vision encoder of '{parts.row.model_type}' gave {[len(item) for item in items]} token scores for "
            f"{modality} features of {list(lengths)} tokens. Use a method that reads nothing of the vision encoder."
        )
    return items


def _carried(
    parts: ModelParts,
    modality: str,
    inputs: Mapping[str, Any],
    lengths: Sequence[int],
    values: Tensor,
    fill: float,
) -> list[Tensor]:
    way = parts.row.tower_to_llm
    if way == "identity":
        # One tower token is one LLM token.
        return list(values)
    if way == "pool":
        return _pool(values, lengths)
    if way == "anyres":
        # Tiles of one picture are laid out again as one grid, with separators behind its rows.
        return _anyres(parts, modality, inputs, values, fill)
    if way == "block_merge":
        # Patches that become one token stand one behind the other, perhaps in the order of windows.
        return _block_merge(parts, modality, inputs, lengths, values)
    if way == "merge_sizes":
        return patch_cells.merge_by_size(modality, inputs, values)
    if way == "packed_rows":
        return patch_cells.packed_rows(parts, inputs, values)
    if way == "cells":
        return patch_cells.pool_cells(modality, inputs, lengths, values)
    if way == "positions":
        return patch_cells.pool_by_position(parts, modality, inputs, lengths, values)
    if way == "index":
        return patch_cells.pool_by_index(modality, inputs, lengths, values)
    return []


def why_not(parts: ModelParts) -> str | None:
    """Return why values of tower tokens cannot be carried to the LLM's tokens, None where they can.

    Raises:
        UnsupportedModelError: the order in which the encoder walks its tokens cannot be told.
    """
    if parts.row.tower_to_llm in _WHY_NOT:
        return _WHY_NOT[parts.row.tower_to_llm]
    if parts.row.tower_to_llm == "block_merge" and parts.tower is not None:
        functions.window_function(parts.tower, parts.config.vision_config)
    return None


def pack_anyres(parts: ModelParts, values: Tensor, inputs: Mapping[str, Any], fill: float) -> list[Tensor]:
    """Pack (tiles, N, C) values as LLaVA-NeXT packs features: overview, then the unpadded grid with row separators."""
    rate = configs.tile_downsample(parts.config)
    if rate != 1:
        # The projector makes fewer tokens of a tile, each of them where its patches are.
        side = math.isqrt(values.shape[1])
        grid = functional.interpolate(_as_grid(values, side), size=(int(side * rate),) * 2, mode="area")
        values = grid.flatten(2).transpose(1, 2)
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


def _anyres(parts: ModelParts, modality: str, inputs: Mapping[str, Any], values: Tensor, fill: float) -> list[Tensor]:
    if modality == "video":
        return _pool_frames(parts, inputs, values, fill)
    return pack_anyres(parts, values, inputs, fill)


def _pool_frames(parts: ModelParts, inputs: Mapping[str, Any], values: Tensor, fill: float) -> list[Tensor]:
    batch = inputs[VIDEO_PIXELS].shape[0]
    side = round(values.shape[1] ** 0.5)
    grid = _as_grid(values, side)
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
    frames = configs.frame_merge(parts.config)
    if modality == "video" and frames > 1:
        merged = _merge_frames(merged, inputs[f"{modality}_grid_thw"], frames)
    return list(torch.split(merged, list(lengths)))


def _merge_frames(values: Tensor, grids: Tensor, frames: int) -> Tensor:
    """Take the mean over so many frames, one behind the other, of values (sum, C) of videos of grids (n, 3)."""
    unit = int(grids.prod(-1).sum()) // len(values)
    sizes = (grids.prod(-1) // unit).tolist()
    merged = []
    for video, (count, _, _) in zip(torch.split(values, sizes), grids.tolist(), strict=True):
        merged.append(video.view(count // frames, frames, -1, values.shape[-1]).mean(1).flatten(0, 1))
    return torch.cat(merged)


def _pool(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Mean over the square of tower tokens behind each LLM token: pixel shuffles and pools in raster order."""
    tiles, count, channels = values.shape
    side, per_tile = math.isqrt(count), sum(lengths) // tiles
    window = side // max(math.isqrt(per_tile), 1)
    pooled = (
        functional.avg_pool2d(_as_grid(values, side), window, window).flatten(2).transpose(1, 2).reshape(-1, channels)
    )
    return list(torch.split(pooled, list(lengths))) if len(pooled) == sum(lengths) else []


def _as_grid(values: Tensor, side: int) -> Tensor:
    """Return (tiles, N, C) values of square tiles as (tiles, C, side, side)."""
    return values.reshape(-1, side, side, values.shape[-1]).permute(0, 3, 1, 2)
