"""Hooks on the modules that a plan reads inside of layers; they do nothing but in a prefill with visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.untraced import untraced
from mllm_squeeze.engine.sequence.passes import Pass
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.source import Spot
from mllm_squeeze.engine.signals.sources import Sources
from mllm_squeeze.upstream.calls import states_of


def put_on(installer: Installer, sources: Sources, running: Callable[[], Pass | None]) -> None:
    """Put a hook on each module whose input or output is read."""
    for spot in sources.spots:
        if spot.side == "input":
            installer.before(spot.module, _before(sources, spot, running))
        elif spot.side == "output":
            installer.after(spot.module, _after(sources, spot, running))


def _before(sources: Sources, spot: Spot, running: Callable[[], Pass | None]) -> Callable[..., None]:
    hear = untraced(sources.hear)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = running()
        if isinstance(now, Prefill):
            hear(now, spot, states_of(module, args, kwargs))

    return hook


def _after(sources: Sources, spot: Spot, running: Callable[[], Pass | None]) -> Callable[..., None]:
    hear = untraced(sources.hear)

    def hook(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        now = running()
        if isinstance(now, Prefill):
            hear(now, spot, output[0] if isinstance(output, tuple) else output)

    return hook
