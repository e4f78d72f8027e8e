"""A tap reads what the attention function of one module is given."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.attention import eager_home, implementation, reads_registry, registry_of
from mllm_squeeze.upstream.attention_call import AttentionCall
from mllm_squeeze.upstream.attention_contract import check_attention, computes_by_itself
from mllm_squeeze.upstream.contract import require

# Without "sdpa", "flash" or "flex" in it: transformers reads those words in a name as support claims.
TAP = "mllm_squeeze_tap"

# Gets what the attention function is called with; True says that the attention itself is not wanted.
Listener = Callable[[AttentionCall], bool]

_lock = threading.Lock()
# Of each registry that holds the tap: how many taps are open. Modeling files may have a registry of their own.
_users: dict[int, int] = {}


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
                "read. Use a method that reads no attention.",
                avoid=["attention"],
            )
        if not reads_registry(type(module)):
            raise UnsupportedModelError(
                f"The attention of {type(module).__name__} cannot be read: {computes_by_itself(type(module))}. Use a "
                "method that reads no attention.",
                avoid=["attention"],
            )
        require(check_attention(config, module))
        self.module = module
        self.original = config
        self._listener = listener
        # Found now: torch.compile traces what a call does.
        self._registry = registry_of(type(module))
        self._eager_home, self._eager_name = eager_home(type(module))
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
