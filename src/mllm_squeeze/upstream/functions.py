"""Functions and methods of transformers' modelling files that we call, and the arguments they are called with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream import configs

_COUNT = ("image_size_to_num_patches", ("image_size", "grid_pinpoints", "patch_size"))
_WINDOWS = (
    "get_vision_window_index",
    ("grid_thw", "spatial_merge_size", "window_size", "patch_size", "kwargs"),
)
_PACK = ("pack_image_features", ("image_features", "image_sizes", "image_newline"))
# Words of an encoder's config that only one with windows has.
_WINDOW_WORDS = ("window_size", "fullatt_block_indexes")


@dataclass(frozen=True)
class Symbol:
    """A function or method of transformers that is relied on, and arguments that it must take."""

    module: str
    name: str
    parameters: tuple[str, ...]


def _symbols(names: Sequence[str], name: str, parameters: tuple[str, ...]) -> tuple[Symbol, ...]:
    found = []
    for model in names:
        folder, _, owner = model.partition(".")
        path = f"transformers.models.{folder}.modeling_{folder}"
        found.append(Symbol(path, f"{owner}.{name}" if owner else name, parameters))
    return tuple(found)


SYMBOLS: tuple[Symbol, ...] = (
    *_symbols(("llava_next", "llava_next_video", "llava_onevision"), *_COUNT),
    *_symbols(
        ("llava_next.LlavaNextModel", "llava_next_video.LlavaNextVideoModel", "llava_onevision.LlavaOnevisionModel"),
        *_PACK,
    ),
    *_symbols(("llava_onevision.LlavaOnevisionModel",), "apply_pooling", ()),
    *_symbols(("qwen2_5_vl", "qwen2_5_omni"), *_WINDOWS),
)


def function_of(owner: nn.Module, name: str, parameters: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return a function of the modelling file that a module's class stands in, or that the file imports.

    owner: the module. name: of the function. parameters: arguments that it must take.

    Raises:
        UnsupportedModelError: the file has no such function, or it does not take these arguments.
    """
    return _function(type(owner).__module__, name, parameters)


@lru_cache(maxsize=64)
def _function(path: str, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    found = vars(sys.modules[path]).get(name)
    if not callable(found):
        raise _moved(path, name, "none of that name")
    return _checked(found, path, name, parameters)


def method_of(owner: nn.Module, name: str, parameters: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return a method of a module.

    Raises:
        UnsupportedModelError: it has no such method, or it does not take these arguments.
    """
    found = getattr(owner, name, None)
    kind = type(owner)
    if not callable(found):
        raise _moved(kind.__module__, f"{kind.__name__}.{name}", "none of that name")
    return _checked(found, kind.__module__, f"{kind.__name__}.{name}", parameters)


def _checked(found: Callable[..., Any], path: str, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    takes = inspect.signature(found).parameters
    lacking = [parameter for parameter in parameters if parameter not in takes]
    if lacking:
        raise _moved(path, name, f"one that takes ({', '.join(takes)}), without {', '.join(lacking)}")
    return found


def _moved(path: str, name: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers {transformers.__version__} is not as expected: `{path}` should have a function `{name}`, found "
        f"{found}. Use a release that mllm_squeeze was tested with, or a method that needs no encoder signal (fastv, "
        "divprune)."
    )


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
    known = inspect.signature(pack).parameters
    more = {
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": inputs.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None),
    }
    given = {name: value for name, value in more.items() if name in known}
    packed, _ = pack(items, inputs["image_sizes"], image_newline=newline, **given)
    return cast("list[Tensor]", packed)


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
    if not _has_windows(tower, config):
        return None
    window = function_of(tower, *_WINDOWS)
    # It looks into `kwargs` for an order that was computed before.
    index, _ = window(
        grids,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
        kwargs={},
    )
    return torch.as_tensor(index)


def _has_windows(tower: nn.Module, config: Any) -> bool:
    """Two witnesses, the config and the file: an encoder with windows must not be taken for one without."""
    return _WINDOWS[0] in vars(sys.modules[type(tower).__module__]) or any(
        getattr(config, word, None) for word in _WINDOW_WORDS
    )
