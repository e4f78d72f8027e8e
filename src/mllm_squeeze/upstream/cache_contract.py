"""What cut caches rely on of transformers' cache classes, which of their methods somebody has looked at, what moved."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache as memoised
from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from mllm_squeeze.upstream.broken import Broken
from mllm_squeeze.upstream.caches import CROPS_STATIC

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
