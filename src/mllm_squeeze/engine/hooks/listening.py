"""Hooks on the modules that a plan reads inside of layers; they do nothing but in a prefill with visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine.decode.static_step import untraced
from mllm_squeeze.engine.hooks.installer import Fittings
from mllm_squeeze.engine.sequence.session import Session
from mllm_squeeze.engine.signals.source import Spot
from mllm_squeeze.engine.signals.sources import Sources
from mllm_squeeze.upstream.calls import states_of


def put_on(fittings: Fittings, sources: Sources, session: Callable[[], Session | None]) -> None:
    """Put a hook on each module whose input or output is read."""
    for spot in sources.spots:
        if spot.side == "input":
            fittings.before(spot.module, _before(sources, spot, session))
        elif spot.side == "output":
            fittings.after(spot.module, _after(sources, spot, session))


def _before(sources: Sources, spot: Spot, session: Callable[[], Session | None]) -> Callable[..., None]:
    hear = untraced(sources.hear)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = session()
        if now is not None and now.cutting:
            hear(now, spot, states_of(module, args, kwargs))

    return hook


def _after(sources: Sources, spot: Spot, session: Callable[[], Session | None]) -> Callable[..., None]:
    hear = untraced(sources.hear)

    def hook(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        now = session()
        if now is not None and now.cutting:
            hear(now, spot, output[0] if isinstance(output, tuple) else output)

    return hook
