"""What the modules of a model are called with, read by role: names of arguments change between releases.

Hooks see a call as the caller wrote it, so an argument may come under each name that any release has for it, and by its
place as well as by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.names import CACHE_NAMES, EMBEDDINGS, HIDDEN, IDS, MASK, POSITIONS, ROPE, ROUTING, USE_CACHE
from mllm_squeeze.upstream.signatures import forward_parameters, places

_PACKED = "cu_seq_lens_q"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, those that came by their place included."""
    if not args:
        return dict(kwargs)
    names = places(type(module).forward)
    if len(args) > len(names):
        raise UnsupportedModelError(
            f"{type(module).__name__} was called with {len(args)} arguments by place, and its forward names "
            f"{len(names)}. Pass them by name."
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}


# The cache


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, None without one."""
    for name in CACHE_NAMES:
        found = kwargs.get(name)
        if found is not None:
            return found
    return None


def cache_name(module: nn.Module) -> str:
    """Return the name under which a module takes a cache.

    Raises:
        UnsupportedModelError: its forward has none of the names that are known.
    """
    found = next((name for name in CACHE_NAMES if name in forward_parameters(module)), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__}.forward takes no argument named {' or '.join(CACHE_NAMES)}, so a cache cannot be "
            "handed to it."
        )
    return found


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that bring no cache."""
    return {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}


def with_cache(module: nn.Module, kwargs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return arguments with another cache, under the name that the module has for it."""
    return {**without_cache(kwargs), cache_name(module): cache}


# One decoder layer, or one encoder block


@dataclass(frozen=True)
class LayerCall:
    """One call of a decoder layer or encoder block.

    hidden: (B, T, D), or several streams (S, B, T, D). mask: as the layer got it. rope: rotary tables, alone, as (cos,
    sin) or by kind. positions: int64 (B, T) or (A, B, T), None where the layer gets none. cache: None without one.
    routing: int (B, T), to which experts each token goes, None where all go to the same. others: further arguments by
    place. named: all arguments that came by name.
    """

    hidden: Tensor
    mask: Any
    rope: Any
    positions: Any
    cache: Any
    routing: Any
    others: tuple[Any, ...]
    named: Mapping[str, Any]
    by_place: bool

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
        """Read the call that a pre-hook sees.

        Raises:
            UnsupportedModelError: it has no hidden states that could be found.
        """
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if not isinstance(hidden, Tensor):
            raise UnsupportedModelError(
                f"A layer was called without hidden states: expected a tensor as its first argument or as '{HIDDEN}', "
                f"found {', '.join(kwargs) or 'no argument by name'}."
            )
        return cls(
            hidden,
            kwargs.get(MASK),
            kwargs.get(ROPE),
            kwargs.get(POSITIONS),
            cache_of(kwargs),
            kwargs.get(ROUTING),
            args[1:],
            kwargs,
            len(args) > 0,
        )

    def replace(self, **changes: Any) -> LayerCall:
        """Return the call with other values of `hidden`, `mask`, `rope`, `positions`, `routing` or `others`."""
        return replace(self, **changes)

    def out(self) -> Arguments:
        """Return the call in the form in which it came."""
        new = dict(self.named)
        for name, value in ((MASK, self.mask), (ROPE, self.rope), (POSITIONS, self.positions), (ROUTING, self.routing)):
            if value is not None or name in new:
                new[name] = value
        if self.by_place:
            return (self.hidden, *self.others), new
        new[HIDDEN] = self.hidden
        return (), new


def states_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the states that a module inside of a layer is called with.

    Raises:
        UnsupportedModelError: they are not found.
    """
    found = args[0] if args else kwargs.get(HIDDEN)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} was called without states: expected a tensor as its first argument or as "
            f"'{HIDDEN}', found {', '.join(kwargs) or 'nothing'}."
        )
    return found


def with_block_mask(call: LayerCall, mask: Tensor) -> LayerCall:
    """Return the call of an encoder block with a mask; a block takes it by its place or by its name."""
    return call.replace(others=(mask, *call.others[1:])) if call.others else call.replace(mask=mask)


def attention_arguments(call: LayerCall) -> dict[str, Any]:
    """Return what a layer hands on to its attention, without hidden states, cache and mask: to run it beside a pass."""
    _, given = call.replace(mask=None).out()
    return {name: value for name, value in without_cache(given).items() if name != HIDDEN} | {MASK: None}


# The text model


@dataclass(frozen=True)
class TextCall:
    """One call of the text model.

    states: (B, T, D) embeddings, or (B, T) ids where it is to look them up. mask, positions: None where not given.
    cache: None without one. packed: several prompts stand in one row. named: all arguments by name.
    """

    states: Tensor
    mask: Any
    positions: Any
    cache: Any
    packed: bool
    named: Mapping[str, Any]

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TextCall:
        """Read the call that a pre-hook sees.

        Raises:
            UnsupportedModelError: it has no tokens, or a cache under a name that is not known.
        """
        given = named(module, args, kwargs)
        states = given.get(EMBEDDINGS)
        states = given.get(IDS) if states is None else states
        if not isinstance(states, Tensor):
            raise UnsupportedModelError(
                f"{type(module).__name__} was called without tokens: expected '{EMBEDDINGS}' or '{IDS}', found "
                f"{', '.join(given) or 'nothing'}."
            )
        found = cache_of(given)
        if found is None:
            _refuse_stray_cache(module, given)
        return cls(states, given.get(MASK), given.get(POSITIONS), found, given.get(_PACKED) is not None, given)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return int(self.states.shape[0])

    @property
    def width(self) -> int:
        """Tokens of this pass, padding included."""
        return int(self.states.shape[1])

    @property
    def ids(self) -> Tensor | None:
        """Ids (B, T), None where only embeddings are given."""
        return self.named.get(IDS)

    @property
    def embeddings(self) -> Tensor | None:
        """Embeddings (B, T, D), None where only ids are given."""
        return self.named.get(EMBEDDINGS)

    def without_cache(self) -> dict[str, Any]:
        """Return the arguments of the same pass that neither reads nor fills a cache."""
        return {**without_cache(self.named), USE_CACHE: False}


def _refuse_stray_cache(module: nn.Module, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, Cache):
            raise UnsupportedModelError(
                f"{type(module).__name__} was given a cache as '{name}'; the names that are known for it are "
                f"{' and '.join(CACHE_NAMES)}. This release of transformers is newer than the library: install a "
                "tested one (constraints.txt), or a newer mllm-squeeze."
            )


def is_one_token(kwargs: Mapping[str, Any]) -> bool:
    """True where a text model is given one token per row; needs no more than the arguments by name."""
    states = kwargs.get(EMBEDDINGS)
    states = kwargs.get(IDS) if states is None else states
    return states is not None and states.shape[1] == 1
