"""Cut layers by themselves: what they answer, and what they do when rows and tokens of them are taken away."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.kv.cut_cache import CutCache
from mllm_squeeze.engine.kv.entries import KeptEntries
from mllm_squeeze.engine.kv.layers import CutLayer, as_cut
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import caches

pytestmark = pytest.mark.quick

SEEN, ROOM = 10, 14
# The first token and the last three; those between are cut.
KEPT = [0, 4, 7, 8, 9]
KINDS: dict[str, Callable[[], Any]] = {
    "growing": DynamicLayer,
    "sliding": lambda: DynamicSlidingWindowLayer(sliding_window=4),
    "static": lambda: StaticLayer(max_cache_len=ROOM),
}
croppable = pytest.mark.parametrize(
    "kind",
    [
        "growing",
        "sliding",
        pytest.param(
            "static",
            marks=pytest.mark.skipif(not caches.CROPS_STATIC, reason="transformers < 5.24 crops no static layer"),
        ),
    ],
)
every = pytest.mark.parametrize("kind", KINDS)


def states(tokens: int, start: int = 0) -> Tensor:
    """Return keys (2, 1, tokens, 2) that say which token they belong to."""
    return torch.arange(start, start + tokens).float()[None, None, :, None].expand(2, 1, -1, 2).clone()


def entries(visual: bool = False) -> KeptEntries:
    columns = torch.tensor([KEPT, KEPT])
    seen = torch.tensor([[False, True, False, False, False]] * 2) if visual else None
    return KeptEntries(columns, None, SEEN, torch.tensor([5, 5]), tail=3, visual=seen)


def write(cache: Any, number: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    kv.serve(cache, number)
    return cache.layers[number].update(keys, keys.clone())


def cut_cache(kind: str, decoded: int = 2, visual: bool = False) -> Any:
    """Return a cache whose first layer holds all tokens and whose second one was cut, with tokens decoded since."""
    cache = Cache(layers=[KINDS[kind if kind == "static" else "growing"](), KINDS[kind]()])
    write(cache, 0, states(SEEN))
    kv.announce(cache, 1, entries(visual))
    write(cache, 1, states(SEEN)[:, :, KEPT])
    for token in range(decoded):
        for number in (0, 1):
            write(cache, number, states(1, SEEN + token))
    return cache


def held(layer: Any) -> list[int]:
    """Return the tokens whose keys a layer holds."""
    count = layer.held(int(layer.get_seq_length()))
    return [int(n) for n in layer.keys[0, 0, :count, 0]]


def named(layer: Any) -> list[int]:
    """Return the tokens that a layer says it holds."""
    count = layer.held(int(layer.get_seq_length()))
    return [int(n) for n in layer.entries.extended(count)[0][0]]


def picture(cache: Any) -> list[Any]:
    """Return all that a crop may change."""
    return [
        (int(layer.get_seq_length()), None if layer.keys is None else layer.keys.clone(), getattr(layer, "entries", 0))
        for layer in cache.layers
    ]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] is b[2] for a, b in zip(one, other, strict=True))


# Cropping


@croppable
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_last_tokens_are_forgotten(kind: str, count: int) -> None:
    """Two are decoded, and the last three of the prompt follow the cut without a gap: five in all."""
    cache = cut_cache(kind)
    cache.crop(-count)
    layer = cache.layers[1]
    left = [n for n in [*KEPT, SEEN, SEEN + 1] if n < SEEN + 2 - count]
    assert int(layer.get_seq_length()) == int(cache.layers[0].get_seq_length()) == SEEN + 2 - count
    assert held(layer) == named(layer) == left
    write(cache, 1, states(1, SEEN + 2 - count))
    assert held(layer) == named(layer) == [*left, SEEN + 2 - count]


@croppable
@pytest.mark.parametrize("count", [6, 9, 12])
def test_a_crop_into_the_cut_takes_nothing(kind: str, count: int) -> None:
    cache = cut_cache(kind)
    before = picture(cache)
    with pytest.raises(UnsupportedInputError, match="holds 5: the cut before it cannot be undone"):
        cache.crop(-count)
    assert same(picture(cache), before)


@pytest.mark.skipif(not caches.CROPS_STATIC, reason="transformers < 5.24 crops no static layer")
def test_columns_of_a_cropped_static_layer() -> None:
    """Each slot still stands for the token that is, or will be, written into it."""
    layer = cut_cache("static").layers[1]
    expected = [*KEPT, *range(SEEN, ROOM)]
    assert layer.columns[0].tolist() == expected
    layer.crop(-4)
    assert layer.columns[0].tolist() == expected and layer.slots == len(expected) and layer.entries.seen == 8


@pytest.mark.skipif(caches.CROPS_STATIC, reason="transformers 5.24 and later crop static layers")
@pytest.mark.parametrize("count", [0, 1])
def test_a_release_that_crops_no_static_layer(count: int) -> None:
    cache = cut_cache("static")
    before = picture(cache)
    with pytest.raises(UnsupportedInputError, match="fixed size.*5.24"):
        cache.crop(-count)
    assert same(picture(cache), before)


@every
def test_a_length_to_keep(kind: str) -> None:
    """A positive argument means that before 5.18, of growing layers, and is refused behind."""
    cache = cut_cache(kind)
    before = picture(cache)
    if kind != "static" and caches.CROPS_TO_LENGTH:
        cache.layers[1].crop(SEEN)
        assert held(cache.layers[1]) == KEPT
        return
    with pytest.raises(UnsupportedInputError):
        cache.crop(SEEN)
    assert same(picture(cache), before)


@croppable
def test_a_crop_behind_a_reset(kind: str) -> None:
    """The cut is gone with what was kept, so all can be forgotten."""
    cache = cut_cache(kind)
    cache.layers[1].reset()
    write(cache, 1, states(6))
    cache.crop(-4)
    assert held(cache.layers[1]) == [0, 1] and int(cache.layers[1].get_seq_length()) == 2


@croppable
def test_a_crop_of_an_empty_layer(kind: str) -> None:
    layer = cut_cache(kind).layers[1]
    layer.reset()
    layer.crop(-2)
    assert int(layer.get_seq_length()) == 0


def test_notes_shrink_with_the_entries() -> None:
    cache = cut_cache("growing", visual=True)
    layer = cache.layers[1]
    layer.notes = {"row": torch.ones(2, len(KEPT))}
    cache.crop(-4)
    assert layer.notes["row"].shape == layer.entries.visual.shape == layer.entries.columns.shape == (2, 3)


def test_a_static_layer_knows_its_length() -> None:
    """Not only its slots: the library compares this with what a prompt needs."""
    assert cut_cache("static").get_max_length() == ROOM
    assert cut_cache("static").layers[1].get_max_length() == ROOM


# Forgetting


@every
def test_a_reset_forgets(kind: str) -> None:
    cache = cut_cache(kind)
    cache.reset()
    layer = cache.layers[1]
    assert int(layer.get_seq_length()) == 0 and layer.entries is None
    keys, _ = write(cache, 1, states(3))
    assert [int(n) for n in keys[0, 0, :3, 0]] == [0, 1, 2]


# Copies


def saved(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "old pickle": lambda cache: pickle.loads(pickle.dumps(cache, protocol=2)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
}


@every
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_cut_cache(kind: str, way: str) -> None:
    cache = cut_cache(kind)
    twin = COPIES[way](cache)
    assert type(twin) is type(cache) and isinstance(twin, CutCache)
    mine, its = cache.layers[1], twin.layers[1]
    assert type(its) is type(mine) and isinstance(its, CutLayer)
    assert held(its) == held(mine) and named(its) == named(mine) and its.keys.data_ptr() != mine.keys.data_ptr()
    write(twin, 1, states(1, SEEN + 2))
    assert named(its) == [*named(mine), SEEN + 2]
    with pytest.raises(UnsupportedInputError, match="no longer applied"):
        its.update(states(1), states(1))


def test_a_copy_shares_entries_where_layers_do() -> None:
    cache = cut_cache("growing", decoded=0)
    cache.layers.append(as_cut(DynamicLayer()))
    cache.layers[2].upcoming, cache.layers[2].served = cache.layers[1].entries, True
    cache.layers[2].update(*[states(SEEN)[:, :, KEPT]] * 2)
    twin = pickle.loads(pickle.dumps(cache))
    assert twin.layers[1].entries is twin.layers[2].entries


def test_keys_alone_are_not_handed_out() -> None:
    """`DynamicCache(iter(cache))` would take the entries for the first tokens."""
    cache = DynamicCache()
    kv.announce(cache, 0, entries())
    write(cache, 0, states(SEEN)[:, :, KEPT])
    with pytest.raises(UnsupportedInputError, match="which tokens"):
        list(cache)
    cache.reset()
    write(cache, 0, states(3))
    assert [layer[0].shape[2] for layer in cache] == [3]
