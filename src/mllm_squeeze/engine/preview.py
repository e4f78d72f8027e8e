"""The attention that a layer would give, by its own projections and rotary embedding, and no more than is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.taps import AttentionCall

# Projections whose output is needed for one row only, or not at all.
_NARROW = ("q_proj", "v_proj")

Reader = Callable[[AttentionCall], None]


class _Enough(Exception):
    """Raised once queries and keys are known: what the module would do with them is not wanted."""


def run_projections(
    attention: nn.Module,
    normed: Tensor,
    row: Tensor | None,
    given: dict[str, Any],
    listeners: dict[nn.Module, Any],
    read: Reader,
) -> None:
    """Call an attention module up to its attention function and read queries and keys there.

    attention: a tapped module. normed: (B, M, D). row: int64 (B, 1), the one row whose query is read, so that queries
    are projected for it alone; None projects all. given: the module's other arguments. read: gets what the
    attention function is called with.
    """

    def listener(call: AttentionCall) -> bool:
        read(call)
        if _offloaded(attention):
            # Its hooks must run to the end, or weights stay where they are not meant to be.
            return True
        raise _Enough

    listeners[attention] = listener
    try:
        with torch.no_grad(), ExitStack() as stack:
            if row is not None and not _offloaded(attention):
                stack.enter_context(_one_row(attention, row))
            attention(normed, **{**given, "past_key_values": None, "attention_mask": None})
    except _Enough:
        pass
    finally:
        del listeners[attention]


def _offloaded(module: nn.Module) -> bool:
    return any(hasattr(part, "_hf_hook") for part in module.modules())


@contextmanager
def _one_row(attention: nn.Module, row: Tensor) -> Iterator[None]:
    """Project one row where only one is read; seen from outside the projections keep their shape.

    Rotary embedding comes behind the projection and by place, so the chosen row still gets its own rotation.
    """
    lengths: list[int] = []
    # Another thread may run the same layer for real meanwhile.
    mine = threading.get_ident()

    def narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != mine:
            return None
        hidden = args[0]
        lengths.append(hidden.shape[1])
        index = row.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *args[1:])

    def widen(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if threading.get_ident() != mine:
            return None
        return output.expand(-1, lengths.pop(), -1)

    hooks = []
    for name in _NARROW:
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Module):
            hooks.append(projection.register_forward_pre_hook(narrow))
            hooks.append(projection.register_forward_hook(widen))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
