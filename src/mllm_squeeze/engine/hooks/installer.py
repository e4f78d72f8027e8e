"""What a handle put on a model: hooks, taps and overridden methods, taken off together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mllm_squeeze.engine.signals.rows import Listener, Tap
from mllm_squeeze.errors import UnsupportedModelError


class Installer:
    """Collects what is put on a model; `remove` leaves it as it was."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def before(self, module: nn.Module, hook: Any) -> None:
        """Call hook(module, args, kwargs) ahead of a module."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Any, first: bool = False) -> None:
        """Call hook(module, args, output) behind a module; first: ahead of the hooks that are there."""
        there = list(module._forward_hooks.items()) if first else []
        self._undo.append(module.register_forward_hook(hook).remove)
        # prepend=True would only change the order of iteration, not that of insertion; torch.compile confuses the two.
        for key, other in there:
            del module._forward_hooks[key]
            module._forward_hooks[key] = other

    def around(self, module: nn.Module, enter: Any, leave: Any) -> None:
        """Call enter(module, args, kwargs) ahead of a module and leave(...) behind it, also after an exception."""
        self.before(module, enter)
        self._undo.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)

    def tap(self, attention: nn.Module, listener: Callable[[], Listener | None]) -> None:
        """Tap an attention module."""
        self._undo.append(Tap(attention, listener).close)

    def override(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """Replace a method on one instance.

        Raises:
            UnsupportedModelError: other code replaced it before, so taking ours off would not restore theirs.
        """
        if name in module.__dict__:
            raise UnsupportedModelError(
                f"{name} of this {type(module).__name__} was replaced on the instance by other code. Remove that "
                "patch, or squeeze first."
            )
        self._undo.append(lambda: module.__dict__.pop(name, None))
        module.__dict__[name] = method

    def nested(self) -> Installer:
        """Return what collects the installer of a while; they come off with these at the latest."""
        inner = Installer()
        self._undo.append(inner.remove)
        return inner

    def add(self, undo: Callable[[], None]) -> None:
        """Remember how to take off something else."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Take everything off, the last first."""
        while self._undo:
            self._undo.pop()()
