"""Tower tokens whose place in the picture is told by the call, and the cells of them that become one LLM token each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream import configs
from mllm_squeeze.upstream.prompts import merge_sizes, patch_grids, patch_positions, pooled_patches


def packed_rows(parts: ModelParts, inputs: Mapping[str, Any], values: Tensor) -> list[Tensor]:
    """Split a packed row (sum, C) into images, and take the mean over the square that a patch merger joins."""
    patch, merge = configs.patch_size(parts.config), configs.projector_merge(parts.config)
    items, start = [], 0
    for height, width in (torch.as_tensor(inputs["image_sizes"]) // patch).tolist():
        items.append(_pooled(values[start : start + height * width], (height, width), merge))
        start += height * width
    return items


def pool_cells(modality: str, inputs: Mapping[str, Any], lengths: Sequence[int], values: Tensor) -> list[Tensor]:
    """Take the mean over the square of patches behind each token, and over all frames of an item.

    values: (tiles, P, C), each padded behind its patches, or (sum, C). Where the encoder itself has joined patches by
    then, there are fewer of them than the inputs say.
    """
    grids = patch_grids(modality, inputs, len(lengths))
    if len(grids) != len(lengths):
        return []
    joined = 1
    if values.ndim == 2:
        joined = _side(sum(math.prod(grid) for grid in grids), len(values))
        values_of = torch.split(values, [t * (h // joined) * (w // joined) for t, h, w in grids]) if joined else ()
    else:
        values_of = tuple(values)
    if len(values_of) != len(grids):
        return []
    items = []
    for mine, (frames, height, width), length in zip(values_of, grids, lengths, strict=True):
        height, width = height // joined, width // joined
        cell = _side(height * width, length)
        if not cell:
            return []
        still = mine[: frames * height * width].unflatten(0, (frames, height * width)).mean(0)
        items.append(_pooled(still, (height, width), cell))
    return items


def _side(patches: int, tokens: int) -> int:
    """Return the side of the square of patches behind each token, 0 where there is none."""
    side = math.isqrt(patches // max(tokens, 1))
    return side if side * side * tokens == patches else 0


def _pooled(values: Tensor, sides: tuple[int, int], cell: int) -> Tensor:
    """Return the mean (tokens, C) over square cells of values (height * width, C)."""
    grid = values.reshape(1, *sides, -1).permute(0, 3, 1, 2)
    return functional.avg_pool2d(grid, cell, cell).flatten(2)[0].transpose(0, 1)


def merge_by_size(modality: str, inputs: Mapping[str, Any], values: Tensor) -> list[Tensor]:
    """Shrink each item by a size of its own; the patches (sum, C) that are joined stand one behind the other."""
    grids = patch_grids(modality, inputs, 0)
    sizes = merge_sizes(modality, inputs)
    items = []
    for mine, (frames, height, width), size in zip(
        torch.split(values, [math.prod(grid) for grid in grids]), grids, sizes, strict=True
    ):
        blocks = mine.view(frames, height // size, width // size, size, size, -1)
        grid = blocks.permute(0, 5, 1, 3, 2, 4).reshape(frames, -1, height, width)
        small = functional.interpolate(grid, size=(height // size, width // size), mode="bilinear")
        items.append(small.permute(0, 2, 3, 1).flatten(0, 2))
    return items


def pool_by_position(
    parts: ModelParts, modality: str, inputs: Mapping[str, Any], lengths: Sequence[int], values: Tensor
) -> list[Tensor]:
    """Take the mean over cells of a fixed size, by the column and row of each patch of (rows, P, C)."""
    places, side = patch_positions(modality, inputs).to(values.device), configs.position_kernel(parts.config)
    if places.shape[:2] != values.shape[:2]:
        return []
    real = (places != -1).all(-1)
    column, row = (places.clamp(min=0) // side).unbind(-1)
    width = (places[..., 0].amax(1, keepdim=True) + 1) // side
    before = functional.pad((real.sum(1) // side**2).cumsum(0), (1, 0))[:-1, None]
    cell = (before + column + width * row)[real]
    total = values.new_zeros(sum(lengths), values.shape[-1]).index_add_(0, cell, values[real])
    return list(torch.split(total / side**2, list(lengths)))


def pool_by_index(modality: str, inputs: Mapping[str, Any], lengths: Sequence[int], values: Tensor) -> list[Tensor]:
    """Take the mean over the patches of (crops, N, C) that each token is said to pool."""
    index = pooled_patches(modality, inputs).to(values.device)
    real = index >= 0
    pooled = values.flatten(0, 1)[index.clamp(min=0)] * real[..., None]
    pooled = (pooled.sum(1) / real.sum(1, keepdim=True).clamp(min=1))[real.any(1)]
    return list(torch.split(pooled, list(lengths))) if len(pooled) == sum(lengths) else []
