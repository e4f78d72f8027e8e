"""The rectangle of visual tokens behind each feature item, one rule per way of tiling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.family.tower_to_llm import pack_anyres, tiles_per_image
from mllm_squeeze.layout import Tile
from mllm_squeeze.upstream import configs, functions
from mllm_squeeze.upstream.prompts import VIDEO_PIXELS


def find_tiles(
    parts: ModelParts, modality: str, inputs: Mapping[str, Any], lengths: Sequence[int]
) -> list[tuple[Tile, ...]]:
    """Return the tiles of each feature item.

    inputs: the arguments that the family's feature method was called with. lengths: visual tokens of each item. An item
    whose grid cannot be told gets no tile.
    """
    rule = parts.row.grid
    if rule == "thw":
        tiles = _thw(parts, inputs.get(f"{modality}_grid_thw"), inputs.get(f"{modality}_merge_sizes"))
    elif modality == "video" and rule == "anyres":
        tiles = _frames(inputs[VIDEO_PIXELS].shape[1], lengths)
    elif rule == "rows":
        tiles = _rows(parts, inputs.get("image_sizes"))
    elif rule == "anyres":
        tiles = _anyres(parts, inputs)
    elif rule == "square":
        tiles = list(map(_square, lengths))
    else:
        tiles = [() for _ in lengths]
    if len(tiles) != len(lengths):
        return [() for _ in lengths]
    return [
        found if sum(tile.length for tile in found) == length else ()
        for found, length in zip(tiles, lengths, strict=True)
    ]


def with_breaks(parts: ModelParts, modality: str, inputs: Mapping[str, Any], lengths: Sequence[int]) -> list[int]:
    """Return lengths that count the break which LLaVA-OneVision sets behind a video.

    Older releases of transformers (5.16) set it after the feature method, whose output then lacks it.
    """
    if modality != "video" or not functions.pools_by_interpolation(parts.base):
        return list(lengths)
    half = math.ceil(configs.patch_grid(parts.config) / 2)
    bare = inputs[VIDEO_PIXELS].shape[1] * half * half
    return [length + 1 if length == bare else length for length in lengths]


def _square(length: int) -> tuple[Tile, ...]:
    side = math.isqrt(length)
    if side * side == length:
        return (Tile(1, side, side),)
    # A CLS token that the family leaves in front of the patches.
    side = math.isqrt(length - 1)
    return (Tile(1, side, side, frame_lead=1),) if side * side == length - 1 else ()


def _thw(parts: ModelParts, grids: torch.Tensor | None, merges: torch.Tensor | None) -> list[tuple[Tile, ...]]:
    if grids is None:
        return []
    same, frames = configs.tower_merge(parts.config), configs.frame_merge(parts.config)
    each = [same] * len(grids) if merges is None else merges.tolist()
    return [
        (Tile(t if t == 1 else t // frames, h // m, w // m),) for (t, h, w), m in zip(grids.tolist(), each, strict=True)
    ]


def _rows(parts: ModelParts, sizes: torch.Tensor | None) -> list[tuple[Tile, ...]]:
    if sizes is None:
        return []
    cell = configs.patch_size(parts.config) * configs.projector_merge(parts.config)
    return [(Tile(1, int(height) // cell, int(width) // cell),) for height, width in sizes.tolist()]


def _frames(frames: int, lengths: Sequence[int]) -> list[tuple[Tile, ...]]:
    tiles: list[tuple[Tile, ...]] = []
    for length in lengths:
        per_frame, tail = divmod(length, frames)
        side = math.isqrt(per_frame)
        tiles.append((Tile(frames, side, side, tail=tail),) if side * side == per_frame and tail <= 1 else ())
    return tiles


def _anyres(parts: ModelParts, inputs: Mapping[str, Any]) -> list[tuple[Tile, ...]]:
    side = configs.patch_grid(parts.config)
    blank = torch.zeros(sum(tiles_per_image(parts, inputs)), side * side, 1)
    packed = pack_anyres(parts, blank, inputs, fill=-1.0)
    tiles: list[tuple[Tile, ...]] = []
    for values in packed:
        separators = (values[:, 0] < 0).nonzero().flatten().tolist()
        base = Tile(1, side, side)
        if len(values) == side * side + len(separators) and len(separators) <= 1:
            tiles.append((Tile(1, side, side, tail=len(separators)),))
            continue
        rows = len(separators)
        width = (len(values) - side * side) // rows - 1
        tiles.append((base, Tile(1, rows, width, row_separators=1)))
    return tiles
