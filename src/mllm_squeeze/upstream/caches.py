"""What is known of transformers' caches: kinds of layers, and how they are found, made and told apart."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
)

from mllm_squeeze.errors import UnsupportedInputError

__all__ = [
    "CROPS_STATIC",
    "CROPS_TO_LENGTH",
    "GROWING",
    "STATIC",
    "VERSION",
    "WITHOUT_ENTRIES",
    "Cache",
    "DynamicLayer",
    "crossed",
    "ensure_layer",
    "has_entries",
    "held_entries",
    "is_growing",
    "is_offloaded",
    "is_static",
    "layer_at",
    "layers_of",
    "new_growing",
    "new_static",
    "put_layer",
    "refuse_layer",
    "require_cache",
    "require_cuttable_kinds",
    "subclass",
    "tokens_seen",
    "whole_length",
]

# Kinds of layers, by exact type: a subclass may keep its entries in other ways, as quantised layers do.
GROWING: tuple[type, ...] = (DynamicLayer, DynamicSlidingWindowLayer)
STATIC: tuple[type, ...] = (StaticLayer,)
# Layers that hold no token by token entries, and those that borrow the entries of another layer (these have a class
# of their own only in later releases).
WITHOUT_ENTRIES: tuple[type, ...] = (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", LinearAttentionLayer))

# `crop` of a static layer came with 5.24; before, nothing could crop one.
CROPS_STATIC = hasattr(StaticLayer, "crop")
VERSION: str = transformers.__version__
# Before 5.18 a positive argument of `crop` was the length to keep.
CROPS_TO_LENGTH = tuple(int(part) for part in VERSION.split(".")[:2]) < (5, 18)


# Caches


def new_growing(config: Any) -> Any:
    """Return an empty cache that grows; config: of the text model."""
    return DynamicCache(config=config)


def new_static(config: Any, length: int) -> Any:
    """Return an empty cache of fixed size, for so many tokens; config: of the text model."""
    return StaticCache(config=config, max_cache_len=length)


def require_cache(cache: Any) -> None:
    """Check that an object is a cache of transformers, or None.

    Raises:
        UnsupportedInputError: it is another object, of which nobody can say what it holds.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedInputError(
            f"The cache (`past_key_values`, since transformers 5.24 `cache`) is a {type(cache).__name__}; a squeezed "
            "model needs a transformers DynamicCache. Pass DynamicCache(config=model.config), or none at all."
        )


def layers_of(cache: Any) -> list[Any]:
    """Return the KV layers of a cache, an empty list for None.

    Raises:
        UnsupportedInputError: the object is no cache of transformers.
    """
    require_cache(cache)
    if cache is None:
        return []
    return layers_of(cache.self_attention_cache) if isinstance(cache, EncoderDecoderCache) else cache.layers


def crossed(cache: Any) -> Any | None:
    """Return the part of a cache that holds what an encoder gave, None where it has none."""
    require_cache(cache)
    return cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else None


def layer_at(cache: Any, number: int) -> Any | None:
    """Return the KV layer of a decoder layer, None where there is no cache or it has not come so far."""
    layers = layers_of(cache)
    return layers[number] if number < len(layers) else None


def ensure_layer(cache: Any, number: int) -> Any:
    """Return the KV layer of a decoder layer; a cache that makes its layers as they come makes it now.

    Raises:
        UnsupportedInputError: the cache was made with fewer layers than the model has.
    """
    layers = layers_of(cache)
    while len(layers) <= number:
        if cache.layer_class_to_replicate is None:
            raise UnsupportedInputError(
                f"The cache was made with {len(layers)} layers, and layer {number} of the model writes into it. Make "
                "it from this model: DynamicCache(config=model.config)."
            )
        layers.append(cache.layer_class_to_replicate())
    return layers[number]


def put_layer(cache: Any, number: int, layer: Any) -> Any:
    """Put another KV layer where one is already, and return it."""
    layers_of(cache)[number] = layer
    return layer


def tokens_seen(cache: Any) -> int:
    """Return the tokens a cache has seen; reads them from the device where it is static.

    Raises:
        UnsupportedInputError: the object is no cache of transformers.
    """
    require_cache(cache)
    return 0 if cache is None else int(cache.get_seq_length())


def is_offloaded(cache: Any) -> bool:
    """True where a cache moves its layers to the CPU and back in each pass."""
    return bool(cache.offloading)


def require_cuttable_kinds(cache: Any, ours: tuple[type, ...]) -> None:
    """Check that every layer of a cache can hold fewer entries than it has seen; ours: classes that do already.

    Raises:
        UnsupportedInputError: a quantised, offloaded or unknown cache, or static layers with a sliding window.
    """
    require_cache(cache)
    if isinstance(cache, EncoderDecoderCache):
        raise UnsupportedInputError(
            f"The cache is a {type(cache).__name__}; a squeezed model needs a transformers DynamicCache. Pass "
            "DynamicCache(config=model.config), or none at all."
        )
    for layer in layers_of(cache):
        if not isinstance(layer, ours) and type(layer) not in (*GROWING, *STATIC, *WITHOUT_ENTRIES):
            refuse_layer(layer)
    if any(is_static(layer) for layer in layers_of(cache)) and is_offloaded(cache):
        raise UnsupportedInputError(
            "The cache is offloaded, and its layers would change their size on the way. Use "
            "cache_implementation='static' or 'dynamic'."
        )


def refuse_layer(layer: Any) -> None:
    """Raise UnsupportedInputError: a layer of this kind can hold no cut."""
    raise UnsupportedInputError(
        f"The cache holds a {type(layer).__name__}, which cannot hold fewer entries than it has seen. Use "
        "cache_implementation='dynamic' (the default of generate), or 'static' for a model without sliding windows."
    )


# Layers


def is_static(layer: Any) -> bool:
    """True for a layer of fixed size, cut or not."""
    return isinstance(layer, StaticLayer)


def is_growing(layer: Any) -> bool:
    """True for a layer without a window that grows with each update, as transformers made it."""
    return type(layer) is DynamicLayer


def has_entries(layer: Any) -> bool:
    """True for a layer that holds keys and values of its own, token by token."""
    return not isinstance(layer, WITHOUT_ENTRIES)


def held_entries(layer: Any, past: int) -> int:
    """Return the entries that a layer holds which was not cut; past: tokens seen."""
    if isinstance(layer, WITHOUT_ENTRIES):
        return 0
    # A layer with a window holds its last entries only; static and quantised ones keep theirs otherwise, but all.
    if type(layer) not in GROWING:
        return past
    return int(layer.keys.shape[-2]) if layer.is_initialized and layer.keys.numel() else 0


def whole_length(layer: Any) -> int | None:
    """Return the tokens that a layer of fixed size may see, None where it grows."""
    return int(layer.max_cache_len) if is_static(layer) else None


def subclass(name: str, bases: tuple[type, ...], module: str) -> Any:
    """Make a subclass of a layer or cache that transformers does not put into its own tables of layer types."""
    # A name in `_layer_type` is what puts a class there; the one that a base has would replace that base.
    return type(name, bases, {"_layer_type": None, "__module__": module})
