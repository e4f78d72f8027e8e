"""How an attention module finds the function that computes it, and a tap that reads what that function is given."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import masking_utils, modeling_utils

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.attention_call import AttentionCall
from mllm_squeeze.upstream.broken import Broken
from mllm_squeeze.upstream.contract import require

# Without "sdpa", "flash" or "flex" in it: transformers reads those words in a name as support claims.
TAP = "mllm_squeeze_tap"

# Gets what the attention function is called with; True says that the attention itself is not wanted.
Listener = Callable[[AttentionCall], bool]

Kind = Literal["eager", "sdpa", "flash", "flex", "other"]

# Which function of transformers makes the masks of an implementation, and so in which form they come.
_MASK_MAKERS: dict[str, Kind] = {
    "eager_mask": "eager",
    "sdpa_mask": "sdpa",
    "flash_attention_mask": "flash",
    "flex_attention_mask": "flex",
}
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"

_lock = threading.Lock()
# Of each registry that holds the tap: how many taps are open. Modeling files may have a registry of their own.
_users: dict[int, int] = {}


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
    return _MASK_MAKERS.get(getattr(maker, "__name__", ""), "other")


def is_flash(name: str) -> bool:
    """True for the implementations of FlashAttention, whose masks are 2-D or None."""
    return kind(name) == "flash"


class Tap:
    """Taps one attention module of one model until `close`.

    The module's `config` attribute points at a copy whose attention implementation is the tap; nothing else of the
    module, the model's config or the class changes.

    listener: called at each call of the attention function; what it returns reads that call, None reads none.

    Raises:
        UnsupportedModelError: the module does not choose its attention by its config and a registry, or does so in a
        way that this release of transformers has changed.
    """

    def __init__(self, module: nn.Module, listener: Callable[[], Listener | None]) -> None:
        config = getattr(module, "config", None)
        if config is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} does not choose its attention through a config, so its scores cannot be "
                "read. Use a method that needs no attention (divprune, uniform)."
            )
        if not _reads_registry(type(module)):
            raise UnsupportedModelError(
                f"The attention of {type(module).__name__} cannot be read: {_computes_by_itself(type(module))}. Use a "
                "method that needs no attention (divprune, uniform)."
            )
        require(check_attention(config, module))
        self.module = module
        self.original = config
        self._listener = listener
        # Found now: torch.compile traces what a call does.
        self._registry = _registry_of(type(module))
        self._eager_home, self._eager_name = _eager_home(type(module))
        tapped = copy.copy(config)
        tapped._attn_implementation_internal = TAP
        tapped._squeeze_tap = self
        _register(self._registry)
        # A model that goes while it is squeezed takes its tap with it.
        self._unregister = weakref.finalize(module, _unregister, self._registry)
        self._unregister.atexit = False
        module.config = tapped

    def close(self) -> None:
        """Put the module's config back."""
        self.module.config = self.original
        self._unregister()

    @property
    def implementation(self) -> str:
        """Name of the attention implementation that the user set."""
        return implementation(self.original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        # A copied config must go on pointing at the living tap, not at a twin nobody closes.
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Let the listener read, then compute attention as without the tap."""
        listener = self._listener()
        if listener is not None:
            call = AttentionCall.read(self.module, args, kwargs)
            # Choosing tokens needs no gradient, and gradient checkpointing must find the same graph without a listener.
            with torch.no_grad():
                unwanted = listener(call)
            if unwanted:
                return call.nothing(), None
        function = self._registry.get_interface(self.implementation, self._eager_home.get(self._eager_name))
        return function(_ModuleView(self.module, self.original), *args, **kwargs)


class _ModuleView:
    """An attention module as its own implementation expects it: with the config that was set by the user."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def computes_by_itself(attention: nn.Module) -> bool:
    """True where an attention module does not choose its attention by its config and a registry: no tap can read it."""
    return getattr(attention, "config", None) is None or not _reads_registry(type(attention))


def check_registry(module: nn.Module) -> list[Broken]:
    """Return what does not hold of how a decoder's attention is chosen and masked, tapped or not; runs no forward.

    A module that computes its attention by itself relies on nothing of it.
    """
    config = getattr(module, "config", None)
    return [] if config is None or not _reads_registry(type(module)) else check_attention(config, module)


def check_attention(config: Any, module: nn.Module) -> list[Broken]:
    """Return what does not hold of what a tap on an attention module relies on; runs no forward.

    config: the module's own.
    """
    cls = type(module)
    if not _reads_registry(cls):
        return [_computes_by_itself(cls)]
    out = [*_registry_faults(_registry_of(cls)), *_mask_faults(), *_config_faults(config)]
    if not out and implementation(config) == "eager":
        out += _eager_faults(cls)
    return out


def _computes_by_itself(cls: type) -> Broken:
    expected = f"to choose its attention by config._attn_implementation and {_REGISTRY}"
    return Broken(f"{cls.__name__}.forward", expected, "no such names in it")


def _registry_faults(registry: Any) -> list[Broken]:
    if registry is None:
        return [Broken(f"transformers.modeling_utils.{_REGISTRY}", "the registry of attention functions", "nothing")]
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
    lacking = [name for name in _MASK_MAKERS if not hasattr(masking_utils, name)]
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
    home, name = _eager_home(cls)
    function = home.get(name)
    if function is None:
        return [Broken(f"{name} in {where}", "the function that computes eager attention", "nothing")]
    first = _first_parameters(function)
    if len(first) < 5 or any(role not in name for role, name in zip(_EAGER_ROLES, first, strict=False)):
        return [Broken(f"{name} in {where}", f"the parameters {', '.join(_EAGER_ROLES)}", str(first))]
    return []


_EAGER_ROLES = ("module", "query", "key", "value", "mask")


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
        twin._attn_implementation_internal = TAP
        _switching[cls] = twin._attn_implementation == TAP and config._attn_implementation == before
    return _switching[cls]


@functools.cache
def _forward_of(cls: type) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """Return globals and names of the forward that chooses the attention function: a subclass may only wrap it."""
    for base in cls.__mro__:
        code: Any = getattr(inspect.unwrap(vars(base).get("forward", _no_forward)), "__code__", None)
        if code is not None and "_attn_implementation" in code.co_names and _REGISTRY in code.co_names:
            return inspect.unwrap(vars(base)["forward"]).__globals__, code.co_names
    return None


def _no_forward() -> None: ...


def _reads_registry(cls: type) -> bool:
    return _forward_of(cls) is not None


def _registry_of(cls: type) -> Any:
    """Return the registry that a class of attention modules looks into."""
    found = _forward_of(cls)
    whole = getattr(modeling_utils, _REGISTRY, None)
    return whole if found is None else found[0].get(_REGISTRY, whole)


def _eager_home(cls: type) -> tuple[Mapping[str, Any], str]:
    """Return where a class of attention modules finds the function that it falls back to, and its name there."""
    found = _forward_of(cls)
    if found is None:
        return {}, _EAGER
    return found[0], next((name for name in found[1] if name.endswith(_EAGER)), _EAGER)


def _tapped_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    config: Any = module.config
    return config._squeeze_tap.forward(*args, **kwargs)


def _register(registry: Any) -> None:
    with _lock:
        if not _users.get(id(registry)):
            registry[TAP] = _tapped_attention
        _users[id(registry)] = _users.get(id(registry), 0) + 1


def _unregister(registry: Any) -> None:
    with _lock:
        _users[id(registry)] -= 1
        if not _users[id(registry)]:
            del _users[id(registry)]
            del registry[TAP]
