"""What is relied on of transformers' caches: it holds on this release, and what a release changes is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    StaticLayer,
)

from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.kv.layers import as_cut
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import cache_contract, caches

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Forget what the check found, before and behind a test that changes transformers."""
    cache_contract.check_caches.cache_clear()
    yield
    cache_contract.check_caches.cache_clear()


def nothing(self: Any) -> None:
    """What a new method of a later release might be."""


# The contract


def test_this_release_is_as_expected() -> None:
    assert [str(broken) for broken in cache_contract.check_caches()] == []
    assert cache_contract.check_caches() is cache_contract.check_caches()


@pytest.mark.parametrize("new", [nothing, property(nothing), True], ids=["method", "property", "attribute"])
@pytest.mark.parametrize(
    "cls", [DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, Cache, DynamicCache, StaticCache]
)
def test_a_name_nobody_has_looked_at(cls: type, new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cls, "drop_entries", new, raising=False)
    broken = {found.what: found for found in cache_contract.check_caches()}
    assert f"{cls.__name__}.drop_entries" in broken
    assert "cut cache" in str(broken[f"{cls.__name__}.drop_entries"])


def test_a_name_in_a_base_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "drop_entries", nothing, raising=False)
    assert {"DynamicLayer.drop_entries", "StaticLayer.drop_entries"} <= {b.what for b in cache_contract.check_caches()}


@pytest.mark.parametrize(("cls", "name"), [(StaticLayer, "batch_select_indices"), (DynamicLayer, "__getitem__")])
def test_a_name_that_is_known_of_another_class_only(cls: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `crop`, which growing layers had and static ones got later."""
    monkeypatch.setattr(cls, name, nothing, raising=False)
    assert f"{cls.__name__}.{name}" in {broken.what for broken in cache_contract.check_caches()}


@pytest.mark.parametrize(
    ("cls", "name", "changed"),
    [
        (DynamicLayer, "update", lambda self, key_states: None),
        (DynamicLayer, "crop", lambda self, length: None),
        (StaticLayer, "get_mask_sizes", lambda self, query_length, layer: None),
        (DynamicSlidingWindowLayer, "reorder_cache", lambda self: None),
        (Cache, "crop", lambda self: None),
    ],
)
def test_parameters_that_changed(cls: type, name: str, changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cls, name, changed)
    (found,) = [broken for broken in cache_contract.check_caches() if broken.what == f"{cls.__name__}.{name}"]
    assert found.expected != found.found
    assert found.found.startswith("(") and found.found.strip("()") in str(found)


def test_a_method_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cache_utils.CacheLayerMixin, "prefetch")
    assert {"DynamicLayer.prefetch", "StaticLayer.prefetch"} <= {
        broken.what for broken in cache_contract.check_caches()
    }


def test_attributes_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Any, max_cache_len: int) -> None:
        self.keys = self.values = None
        self.is_initialized, self.size, self.cumulative_length = False, max_cache_len, 0

    monkeypatch.setattr(StaticLayer, "__init__", rename)
    assert [broken.what for broken in cache_contract.check_caches()] == ["StaticLayer().max_cache_len"]


def test_a_layer_that_is_made_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaticLayer, "__init__", lambda self, size: None)
    (found,) = cache_contract.check_caches()
    assert found.what == "StaticLayer" and "max_cache_len" in found.found


@pytest.mark.parametrize(
    "layer",
    [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4), StaticLayer(max_cache_len=4)],
    ids=lambda layer: type(layer).__name__,
)
def test_cut_layers_join_no_table(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the base is in a table by a name of its own, which a subclass would take over."""
    tables = (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING)
    monkeypatch.setattr(type(layer), "_layer_type", "of_a_test")
    before = [dict(table) for table in tables]
    caches.subclass("Ours", (type(layer),), __name__)
    assert [dict(table) for table in tables] == before


# Finding layers


def test_no_cache_holds_nothing() -> None:
    assert caches.layers_of(None) == [] and caches.layer_at(None, 3) is None and caches.tokens_seen(None) == 0
    assert not kv.is_cut(None) and not kv.is_static(None)


@pytest.mark.parametrize("unknown", [((torch.ones(1),) * 2,), object(), {"layers": []}], ids=["tuple", "any", "dict"])
@pytest.mark.parametrize(
    "question", [kv.is_cut, kv.is_static, kv.tokens_seen, lambda cache: kv.kept_entries(cache, 0), kv.require_cuttable]
)
def test_an_unknown_object_is_refused(unknown: Any, question: Any) -> None:
    with pytest.raises(UnsupportedInputError, match=f"{type(unknown).__name__}; .*DynamicCache"):
        question(unknown)


def test_layers_that_come_later() -> None:
    cache = DynamicCache()
    assert caches.layer_at(cache, 2) is None
    made = caches.ensure_layer(cache, 2)
    assert len(cache.layers) == 3 and caches.layer_at(cache, 2) is made and type(made) is DynamicLayer


def test_a_cache_with_too_few_layers() -> None:
    cache = Cache(layers=[DynamicLayer()])
    with pytest.raises(UnsupportedInputError, match="1 layers, and layer 1 .*config"):
        caches.ensure_layer(cache, 1)
    assert len(cache.layers) == 1


def test_a_cache_of_an_encoder_and_a_decoder() -> None:
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.update(*torch.ones(2, 1, 1, 3, 2), 0)
    assert caches.layers_of(cache) is cache.self_attention_cache.layers and not kv.is_cut(cache)
    assert kv.tokens_seen(cache) == 3
    with pytest.raises(UnsupportedInputError, match="EncoderDecoderCache"):
        kv.require_cuttable(cache)


class Quantised(DynamicLayer):
    """Keeps its entries otherwise, so that `keys` says nothing of how many they are."""


@pytest.mark.parametrize(
    ("layer", "held"),
    [(Quantised(), 5), (StaticLayer(max_cache_len=8), 5), (DynamicLayer(), 0), (LinearAttentionLayer(), 0)],
    ids=lambda value: type(value).__name__,
)
def test_entries_of_layers_that_were_not_cut(layer: Any, held: int) -> None:
    cache = Cache(layers=[layer])
    assert kv.held_entries(cache, 0, 5) == held and kv.held_entries(cache, 1, 5) == 0


def test_kinds_that_can_be_cut() -> None:
    cut = as_cut(DynamicLayer())
    for layers in (
        [DynamicLayer(), cut],
        [DynamicSlidingWindowLayer(sliding_window=3)],
        [StaticLayer(max_cache_len=4)],
    ):
        kv.require_cuttable(Cache(layers=layers))
    with pytest.raises(UnsupportedInputError, match="Quantised"):
        kv.require_cuttable(Cache(layers=[cut, Quantised()]))
