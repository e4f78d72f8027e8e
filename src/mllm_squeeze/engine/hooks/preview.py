"""Hooks on the projections of an attention module, for a preview that needs one row of its queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.sequence.passes import Pass
from mllm_squeeze.engine.sequence.signal_store import OneRow
from mllm_squeeze.upstream.calls import Arguments
from mllm_squeeze.upstream.projections import rowwise_projections


def put_on(installer: Installer, attention: nn.Module, running: Callable[[], Pass | None]) -> None:
    """Put hooks on the projections of an attention module, which do nothing but in a preview that runs one row.

    They are there as long as the handle is, so that nothing is left on the model however a preview ends.
    """

    def one() -> OneRow | None:
        now = running()
        return None if now is None else now.signals.one_row.get(attention)

    def narrow(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Arguments | None:
        wanted = one()
        if wanted is None:
            return None
        hidden = args[0]
        index = wanted.row.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *args[1:]), kwargs

    # Rotary embedding comes behind the projection and by place, so the chosen row still gets its own rotation.
    def widen(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        wanted = one()
        return None if wanted is None else output.expand(-1, wanted.length, -1)

    for projection in rowwise_projections(attention):
        installer.before(projection, narrow)
        installer.after(projection, widen)
