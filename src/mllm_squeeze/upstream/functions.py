"""Functions and methods of transformers' modelling files that we call, and the arguments they are called with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream import configs
from mllm_squeeze.upstream.broken import Broken

_COUNT = ("image_size_to_num_patches", ("image_size", "grid_pinpoints", "patch_size"))
_WINDOWS = (
    "get_vision_window_index",
    ("grid_thw", "spatial_merge_size", "window_size", "patch_size", "kwargs"),
)
_PACK = ("pack_image_features", ("image_features", "image_sizes", "image_newline"))
# Words of an encoder's config that only one with windows has.
_WINDOW_WORDS = ("window_size", "fullatt_block_indexes")


def function_of(owner: nn.Module, name: str, parameters: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return a function of the modelling file that a module's class stands in, or that the file imports.

    owner: the module. name: of the function. parameters: arguments that it must take.

    Raises:
        UnsupportedModelError: the file has no such function, or it does not take these arguments.
    """
    return _require(_in_file(owner, name), f"{type(owner).__module__}.{name}", parameters)


def _in_file(owner: nn.Module, name: str) -> Any:
    """Return what a name stands for in the file of a module's class, or in that of a class it is made from."""
    files = (sys.modules.get(kind.__module__) for kind in type(owner).__mro__)
    return next((vars(file)[name] for file in files if file is not None and name in vars(file)), None)


def method_of(owner: nn.Module, name: str, parameters: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return a method of a module.

    Raises:
        UnsupportedModelError: it has no such method, or it does not take these arguments.
    """
    kind = type(owner)
    return _require(getattr(owner, name, None), f"{kind.__module__}.{kind.__name__}.{name}", parameters)


def _require(found: Any, path: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    problem = _problem(found, parameters)
    if problem:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} is not as expected: `{path}` should be a function, found "
            f"{problem}. Use a release that mllm_squeeze was tested with, or a method that reads nothing of the vision "
            "encoder.",
            avoid=["encoder attention"],
        )
    checked: Callable[..., Any] = found
    return checked


def _problem(found: Any, parameters: tuple[str, ...]) -> str:
    """Return what is wrong with a function, "" where it takes these arguments."""
    if not callable(found):
        return "none of that name"
    takes = _takes(getattr(found, "__func__", found))
    lacking = [name for name in parameters if name not in takes]
    return f"one that takes ({', '.join(takes)}), without {', '.join(lacking)}" if lacking else ""


@lru_cache(maxsize=64)
def _takes(found: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(found).parameters)


# What the families' pictures become


def count_tiles(base: nn.Module, config: Any, sizes: Sequence[Any]) -> list[int]:
    """Return how many tiles the encoder gets of each image of an anyres family, the overview included.

    base: the inner model. config: of the whole model. sizes: (height, width) of each image in pixels.

    Raises:
        UnsupportedModelError: the modelling file has no function that counts them.
    """
    count = function_of(base, *_COUNT)
    pinpoints, side = config.image_grid_pinpoints, configs.tile_size(config)
    return [count(image_size=size, grid_pinpoints=pinpoints, patch_size=side) for size in sizes]


def pack_tiles(
    base: nn.Module, config: Any, items: Sequence[Tensor], inputs: Mapping[str, Any], newline: Tensor
) -> list[Tensor]:
    """Pack the values of each image's tiles as an anyres family packs its features.

    base: the inner model. config: of the whole model. items: (tiles, N, C) of each image. inputs: of the feature
    method. newline: (C,), what stands for a separator. Returns (length, C) of each image.

    Raises:
        UnsupportedModelError: the inner model has no method that packs features so.
    """
    pack = method_of(base, *_PACK)
    known = _takes(getattr(pack, "__func__", pack))
    more = {
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": inputs.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None),
    }
    given = {name: value for name, value in more.items() if name in known}
    packed = pack(items, inputs["image_sizes"], image_newline=newline, **given)
    # Most hand out their lengths as well.
    return cast("list[Tensor]", packed[0] if isinstance(packed, tuple) else packed)


def pools_by_interpolation(base: nn.Module) -> bool:
    """True where frames of a video are halved by bilinear interpolation, with one separator behind them all."""
    return hasattr(base, "apply_pooling")


def pools_by_mean(base: nn.Module) -> bool:
    """True where frames of a video are pooled by a mean, or by a convolution of that stride."""
    return hasattr(base, "vision_resampler")


def window_order(tower: nn.Module, config: Any, grids: Tensor) -> Tensor | None:
    """Return the order in which an encoder walks the merged tokens, None where it is the raster order.

    tower: the encoder. config: of it. grids: int64 (n, 3), frames, height and width of each picture in patches.

    Raises:
        UnsupportedModelError: the encoder has windows, and its file has no function that orders tokens by them.
    """
    window = window_function(tower, config)
    if window is None:
        return None
    # It looks into `kwargs` for an order that was computed before.
    index, _ = window(
        grids,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
        kwargs={},
    )
    return torch.as_tensor(index)


def window_function(tower: nn.Module, config: Any) -> Callable[..., Any] | None:
    """Return the function that orders tokens by the windows of an encoder, None for an encoder without windows.

    There are two witnesses, the config and the file: an encoder with windows must not be taken for one without.

    Raises:
        UnsupportedModelError: the encoder has windows, and its file has no such function.
    """
    name, parameters = _WINDOWS
    if _in_file(tower, name) is not None or any(getattr(config, word, None) for word in _WINDOW_WORDS):
        return function_of(tower, name, parameters)
    return None


def check_tiles(base: nn.Module) -> list[Broken]:
    """Return what an anyres family lacks of the functions that say what becomes of its tiles; base: the inner model."""
    path = type(base).__module__
    wanted = (
        (f"{path}.{_COUNT[0]}", _in_file(base, _COUNT[0]), _COUNT[1]),
        (f"{path}.{type(base).__name__}.{_PACK[0]}", getattr(base, _PACK[0], None), _PACK[1]),
    )
    return [
        Broken(where, f"a function that takes ({', '.join(parameters)})", problem)
        for where, found, parameters in wanted
        if (problem := _problem(found, parameters))
    ]
