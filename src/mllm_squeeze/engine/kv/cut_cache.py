"""A cache some of whose layers are cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache as memoised
from typing import Any

from mllm_squeeze.engine.kv.layers import CutLayer
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import caches


class CutCache:
    """A cache some of whose layers are cut: it crops all of them, or none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_cache, (type(self).__bases__[-1],), self.__dict__

    def __iter__(self) -> Iterator[Any]:
        """Hand out keys and values layer by layer, as transformers does, where no layer holds a cut.

        Raises:
            UnsupportedInputError: a layer holds a cut, and its keys alone do not say which tokens they belong to.
        """
        if any(isinstance(layer, CutLayer) and layer.entries is not None for layer in caches.layers_of(self)):
            raise UnsupportedInputError(
                "The keys and values of a cut cache cannot be taken out one by one: they do not say which tokens they "
                "belong to. Copy the cache itself (copy.deepcopy, pickle), or read cache.layers[n].keys."
            )
        return super().__iter__()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; raises like `crop` of its cut layers, before any layer forgot."""
        for layer in caches.layers_of(self):
            if isinstance(layer, CutLayer):
                layer.count_to_crop(tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]


def mark_cut(cache: Any) -> None:
    """Make a cache of transformers a `CutCache`; it stays the same object."""
    if not isinstance(cache, CutCache):
        cache.__class__ = _cut_cache_class(cache.__class__)


def _empty_cache(base: type) -> Any:
    cls: Any = _cut_cache_class(base)
    return cls.__new__(cls)


@memoised
def _cut_cache_class(base: type) -> Any:
    return caches.subclass(f"Cut{base.__name__}", (CutCache, base), __name__)
