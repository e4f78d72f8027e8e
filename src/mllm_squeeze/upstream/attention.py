"""How an attention module finds the function that computes it, and which masks that function is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import masking_utils, modeling_utils

Kind = Literal["eager", "sdpa", "flash", "flex", "other"]

# Which function of transformers makes the masks of an implementation, and so in which form they come.
MASK_MAKERS: dict[str, Kind] = {
    "eager_mask": "eager",
    "sdpa_mask": "sdpa",
    "flash_attention_mask": "flash",
    "flex_attention_mask": "flex",
}
# Name of the registry of attention functions in modeling files, and the end of the name of what they fall back to.
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"


def implementation(config: Any) -> str:
    """Return the name of the attention implementation of a config; transformers takes None for "eager"."""
    name = config._attn_implementation
    return "eager" if name is None else str(name)


@contextmanager
def using(config: Any, name: str) -> Iterator[None]:
    """Let the modules that share a config compute attention by another implementation for a while."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def kind(name: str) -> Kind:
    """Return which masks an implementation is given: by the function that transformers has registered for its masks.

    "eager": 4-D, added to the logits. "sdpa": 4-D bool, or None by the rules of SDPA. "flash": 2-D or None. "flex":
    BlockMask. "other": one that other code registered, without masks or with masks of which nothing is known.
    """
    if name == "eager":
        return "eager"
    makers: Any = getattr(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    maker = None if makers is None else makers.get(name)
    return MASK_MAKERS.get(getattr(maker, "__name__", ""), "other")


def is_flash(name: str) -> bool:
    """True for the implementations of FlashAttention, whose masks are 2-D or None."""
    return kind(name) == "flash"


@functools.cache
def _forward_of(cls: type) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """Return globals and names of the forward that chooses the attention function: a subclass may only wrap it."""
    for base in cls.__mro__:
        code: Any = getattr(inspect.unwrap(vars(base).get("forward", _no_forward)), "__code__", None)
        if code is not None and "_attn_implementation" in code.co_names and REGISTRY in code.co_names:
            return inspect.unwrap(vars(base)["forward"]).__globals__, code.co_names
    return None


def _no_forward() -> None: ...


def reads_registry(cls: type) -> bool:
    """Say whether a class of attention modules chooses its function by its config and a registry."""
    return _forward_of(cls) is not None


def computes_by_itself(attention: nn.Module) -> bool:
    """True where an attention module does not choose its attention by its config and a registry: no tap can read it."""
    return getattr(attention, "config", None) is None or not reads_registry(type(attention))


def registry_of(cls: type) -> Any:
    """Return the registry that a class of attention modules looks into."""
    found = _forward_of(cls)
    whole = getattr(modeling_utils, REGISTRY, None)
    return whole if found is None else found[0].get(REGISTRY, whole)


def eager_home(cls: type) -> tuple[Mapping[str, Any], str]:
    """Return where a class of attention modules finds the function that it falls back to, and its name there."""
    found = _forward_of(cls)
    if found is None:
        return {}, _EAGER
    return found[0], next((name for name in found[1] if name.endswith(_EAGER)), _EAGER)
