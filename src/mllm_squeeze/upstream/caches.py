"""What is known of transformers' caches: kinds of layers, how they are found, which methods somebody looked at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache as memoised
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
from mllm_squeeze.upstream.broken import Broken

__all__ = [
    "CROPS_STATIC",
    "CROPS_TO_LENGTH",
    "GROWING",
    "STATIC",
    "VERSION",
    "WITHOUT_ENTRIES",
    "Cache",
    "DynamicLayer",
    "check_caches",
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


# What we looked at

# Ours have their own, since the base's would lose count of the entries.
_OVERRIDDEN = {"update", "get_seq_length", "get_mask_sizes", "reset", "reorder_cache", "crop"}
_OVERRIDDEN_GROWING = _OVERRIDDEN | {"batch_repeat_interleave", "batch_select_indices"}
_OVERRIDDEN_STATIC = _OVERRIDDEN | {"get_max_length"}
_OVERRIDDEN_CACHE = {"crop"}
# Ours refuse them while they hold a cut: they hand out keys without saying which tokens these are.
_REFUSED_CACHE = {"__iter__"}
# They touch no entry, or move all of them as they are (`offload`, `prefetch`), or are called by ours.
_HARMLESS_LAYER = {
    "get_max_cache_shape",  # until 5.18, by get_max_length
    "is_compileable",
    "is_croppable",  # asks for the last tokens, which a cut layer does forget; `crop` refuses what lies before them
    "is_sliding",
    "lazy_initialization",
    "offload",
    "prefetch",
    "supports_early_init",
}
_HARMLESS_GROWING = _HARMLESS_LAYER | {"get_max_length"}
# Cut layers keep all they have seen behind the cut, whatever the window, so there is always a past to go back to.
_HARMLESS_SLIDING = _HARMLESS_GROWING | {"activate_past_recording"}
# They ask the layers, one after the other; or layers without entries, which are never cut.
_HARMLESS_CACHE = {
    "activate_past_recording",
    "batch_repeat_interleave",
    "batch_select_indices",
    "batch_size",
    "early_initialization",  # leaves out layers that are filled; one that was reset has its whole size again
    "get_conv_state",
    "get_mask_sizes",
    "get_max_cache_shape",
    "get_max_length",
    "get_query_offset",
    "get_recurrent_state",
    "get_seq_length",
    "has_previous_state",
    "is_compileable",
    "is_croppable",
    "is_dummy",
    "is_initialized",
    "is_linear",
    "is_recording_past",
    "is_sliding",
    "max_batch_size",  # until 5.18
    "max_cache_len",  # until 5.18; raises where layers differ
    "offload",
    "prefetch",
    "reorder_cache",
    "reset",
    "update",
    "update_conv_state",
    "update_indexer",  # of layers that require_cuttable_kinds refuses
    "update_recurrent_state",
}

# Every public name of a class that we subclass. A name that is not here may change the entries behind our back.
KNOWN: dict[type, set[str]] = {
    DynamicLayer: _OVERRIDDEN_GROWING | _HARMLESS_GROWING,
    DynamicSlidingWindowLayer: _OVERRIDDEN_GROWING | _HARMLESS_SLIDING,
    StaticLayer: _OVERRIDDEN_STATIC | _HARMLESS_LAYER,
    Cache: _OVERRIDDEN_CACHE | _HARMLESS_CACHE,
    DynamicCache: _OVERRIDDEN_CACHE | _REFUSED_CACHE | _HARMLESS_CACHE,
    StaticCache: _OVERRIDDEN_CACHE | _HARMLESS_CACHE,
}
# Special methods that give a class other ways to hand out or replace what it holds.
_SPECIAL = {"__iter__", "__getitem__", "__setitem__", "__delitem__", "__getattr__", "__setattr__", "__getstate__"}
_SPECIAL |= {"__setstate__", "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__"}

# Parameters of what we override or call, as transformers writes and passes them.
_LAYER_METHODS = {
    "update": "key_states, value_states, *args, **kwargs",
    "lazy_initialization": "key_states, value_states",
    "get_seq_length": "",
    "get_mask_sizes": "query_length",
    "get_max_length": "",
    "reset": "",
    "reorder_cache": "beam_idx",
    "offload": "",
    "prefetch": "",
}
_GROWING_METHODS = _LAYER_METHODS | {
    "crop": "tokens_to_remove",
    "batch_repeat_interleave": "repeats",
    "batch_select_indices": "indices",
}
_STATIC_METHODS = _LAYER_METHODS | ({"crop": "tokens_to_remove"} if CROPS_STATIC else {})
_CACHE_METHODS = {
    "update": "key_states, value_states, layer_idx, *args, **kwargs",
    "get_seq_length": "layer_idx",
    "crop": "tokens_to_remove",
}
METHODS: dict[type, dict[str, str]] = {
    DynamicLayer: _GROWING_METHODS,
    DynamicSlidingWindowLayer: _GROWING_METHODS,
    StaticLayer: _STATIC_METHODS,
    Cache: _CACHE_METHODS,
}


@memoised
def check_caches() -> list[Broken]:
    """Return what of the cache classes is not as cut caches need it.

    Checks names, parameters and attributes, no behaviour; the answer is remembered (`check_caches.cache_clear`).
    """
    found: list[Broken] = []
    for cls, names in KNOWN.items():
        found += _unknown(cls, names)
    for cls, methods in METHODS.items():
        found += _changed(cls, methods)
    found += _missing(DynamicLayer, lambda: DynamicLayer(), ("keys", "values", "is_initialized"))
    sliding = ("keys", "values", "is_initialized", "sliding_window")
    found += _missing(DynamicSlidingWindowLayer, lambda: DynamicSlidingWindowLayer(sliding_window=2), sliding)
    static = ("keys", "values", "is_initialized", "max_cache_len", "cumulative_length")
    found += _missing(StaticLayer, lambda: StaticLayer(max_cache_len=1), static)
    found += _missing(Cache, lambda: Cache(layers=[]), ("layers", "layer_class_to_replicate", "offloading"))
    for cls in (DynamicLayer, StaticLayer):
        if getattr(cls, "_layer_type", "") is not None:
            found.append(Broken(f"{cls.__name__}._layer_type", "None, so that subclasses join no table", "another"))
    return found


def _unknown(cls: type, known: set[str]) -> Iterator[Broken]:
    for name in sorted(_public(cls) - known):
        expected = "only methods whose effect on a cut cache somebody has looked at"
        yield Broken(f"{cls.__name__}.{name}", expected, "a new one, which may change entries that a cut counts on")


def _public(cls: type) -> set[str]:
    names = {name for name in dir(cls) if not name.startswith("_")}
    return names | {name for name in _SPECIAL if getattr(cls, name, None) is not getattr(object, name, None)}


def _changed(cls: type, methods: dict[str, str]) -> Iterator[Broken]:
    for name, expected in methods.items():
        found = _parameters(getattr(cls, name, None))
        if found != f"({expected})":
            yield Broken(f"{cls.__name__}.{name}", f"parameters ({expected})", found)


def _parameters(method: Any) -> str:
    if not callable(method):
        return "no method of that name"
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    given = list(inspect.signature(method).parameters.values())[1:]
    return f"({', '.join(stars.get(p.kind.name, '') + p.name for p in given)})"


def _missing(cls: type, make: Callable[[], Any], names: tuple[str, ...]) -> Iterator[Broken]:
    try:
        made = make()
    except Exception as error:
        yield Broken(cls.__name__, "to be made with the arguments of the releases tested", f"{error!r}")
        return
    for name in names:
        if name not in vars(made):
            yield Broken(f"{cls.__name__}().{name}", "an attribute of each one", "none of that name")
