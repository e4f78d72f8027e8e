"""What a tap relies on of the way in which attention is chosen, and what of it does not hold on this release."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import masking_utils

from mllm_squeeze.upstream.attention import (
    MASK_MAKERS,
    REGISTRY,
    eager_home,
    implementation,
    reads_registry,
    registry_of,
)
from mllm_squeeze.upstream.broken import Broken

_EAGER_ROLES = ("module", "query", "key", "value", "mask")
# Stands for the name of any implementation: no function is looked up by it.
_ANOTHER = "another"


def check_registry(module: nn.Module) -> list[Broken]:
    """Return what does not hold of how a decoder's attention is chosen and masked, tapped or not; runs no forward.

    A module that computes its attention by itself relies on nothing of it.
    """
    config = getattr(module, "config", None)
    return [] if config is None or not reads_registry(type(module)) else check_attention(config, module)


def check_attention(config: Any, module: nn.Module) -> list[Broken]:
    """Return what does not hold of what a tap on an attention module relies on; runs no forward.

    config: the module's own.
    """
    cls = type(module)
    if not reads_registry(cls):
        return [computes_by_itself(cls)]
    out = [*_registry_faults(registry_of(cls)), *_mask_faults(), *_config_faults(config)]
    if not out and implementation(config) == "eager":
        out += _eager_faults(cls)
    return out


def computes_by_itself(cls: type) -> Broken:
    """Return what is said of a class of attention modules that looks into no registry."""
    expected = f"to choose its attention by config._attn_implementation and {REGISTRY}"
    return Broken(f"{cls.__name__}.forward", expected, "no such names in it")


def _registry_faults(registry: Any) -> list[Broken]:
    if registry is None:
        return [Broken(f"transformers.modeling_utils.{REGISTRY}", "the registry of attention functions", "nothing")]
    name = type(registry).__name__
    out = [
        Broken(f"{name}.{method}", f"a method that {purpose}", "nothing")
        for method, purpose in (
            ("get_interface", "finds a function by name"),
            ("__setitem__", "registers a function"),
            ("__delitem__", "takes it out again"),
        )
        if not callable(getattr(registry, method, None))
    ]
    if not out and not _takes(type(registry).get_interface, 3):
        out.append(Broken(f"{name}.get_interface", "the arguments name and default", "others"))
    return out


def _mask_faults() -> list[Broken]:
    lacking = [name for name in MASK_MAKERS if not hasattr(masking_utils, name)]
    if not hasattr(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS"):
        lacking.append("ALL_MASK_ATTENTION_FUNCTIONS")
    return [Broken(f"transformers.masking_utils.{name}", "what makes attention masks", "nothing") for name in lacking]


def _config_faults(config: Any) -> list[Broken]:
    name = type(config).__name__
    if not hasattr(config, "_attn_implementation") or not hasattr(config, "_attn_implementation_internal"):
        return [Broken(name, "_attn_implementation, kept in _attn_implementation_internal", "no such attributes")]
    if not _switches(type(config), config):
        return [Broken(f"{name}._attn_implementation", "to be read from _attn_implementation_internal", "otherwise")]
    return []


def _eager_faults(cls: type) -> list[Broken]:
    where = f"the module of {cls.__name__}"
    home, name = eager_home(cls)
    function = home.get(name)
    if function is None:
        return [Broken(f"{name} in {where}", "the function that computes eager attention", "nothing")]
    first = _first_parameters(function)
    if len(first) < 5 or any(role not in name for role, name in zip(_EAGER_ROLES, first, strict=False)):
        return [Broken(f"{name} in {where}", f"the parameters {', '.join(_EAGER_ROLES)}", str(first))]
    return []


@functools.cache
def _first_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[:5]


@functools.cache
def _takes(function: Callable[..., Any], count: int) -> bool:
    """Say whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


_switching: dict[type, bool] = {}


def _switches(cls: type, config: Any) -> bool:
    """Say whether a copy of a config can be given another implementation, and the config itself keeps its own."""
    if cls not in _switching:
        twin, before = copy.copy(config), config._attn_implementation
        twin._attn_implementation_internal = _ANOTHER
        _switching[cls] = twin._attn_implementation == _ANOTHER and config._attn_implementation == before
    return _switching[cls]
