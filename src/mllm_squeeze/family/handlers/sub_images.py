"""Pictures that are cut into crops, pooled, and laid out as rows of the whole grid, a break, and the small picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze.upstream import configs
from mllm_squeeze.upstream.prompts import EmbedderCall


def lay_out(config: object, call: EmbedderCall, values: Tensor, fill: float) -> list[Tensor]:
    """Carry values of patches to the tokens of each picture.

    config: of the whole model. call: of the module that embeds the pictures. values: float32 (pictures * crops, N, C);
    the first crop of each picture is the picture in small. fill: value of the breaks. Returns (length, C) each.
    """
    side = math.isqrt(values.shape[1])
    grid = values.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if side % 2:
        grid = functional.pad(grid, (0, 1, 0, 1), mode="reflect")
    crops = functional.avg_pool2d(grid, 2, 2).permute(0, 2, 3, 1).unflatten(0, (len(call.sizes), -1))
    return [_one_picture(config, call, n, crops[n], fill) for n in range(len(call.sizes))]


def _one_picture(config: object, call: EmbedderCall, number: int, crops: Tensor, fill: float) -> Tensor:
    height, width = (length // configs.crop_size(config) for length in call.sizes[number])
    small, large = crops[0], crops[1 : 1 + height * width]
    side, channels = small.shape[0], small.shape[-1]
    large = large.view(height, width, side, side, channels).transpose(1, 2)
    large = large.reshape(height * side, width * side, channels)
    if call.mask is not None:
        real = call.mask[number, 1 : 1 + height * width, ::2, ::2]
        real = real.reshape(height, width, side, side).transpose(1, 2).reshape(height * side, width * side)
        large = large[: int(real[:, 0].sum()), : int(real[0].sum())]
    return torch.cat([_with_breaks(large, fill), crops.new_full((1, channels), fill), _with_breaks(small, fill)])


def _with_breaks(grid: Tensor, fill: float) -> Tensor:
    """Return the rows (height, width, C), one after the other, with a break behind each."""
    return functional.pad(grid, (0, 0, 0, 1), value=fill).flatten(0, 1)


def by_runs(ids: Tensor, placeholder: int, items: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Deal the tokens of all pictures to the unbroken runs of placeholders; ids: int64 (B, T)."""
    here = (ids == placeholder).cpu()
    before = functional.pad(here[:, :-1], (1, 0))
    run = (here & ~before).flatten().cumsum(0)[here.flatten()]
    return tuple(torch.split(torch.cat(list(items)), torch.bincount(run)[1:].tolist()))
