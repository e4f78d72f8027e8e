"""A squeezed run of a text model with a cache, step by step, and one pass without a cache that must give the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.checking.prompt import LENGTH, TrialPrompt
from mllm_squeeze.engine.hooks import self_check as selfcheck
from mllm_squeeze.engine.hooks.attachment import Attachment
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream.caches import new_growing, new_static
from mllm_squeeze.upstream.calls import Arguments, LayerCall, with_cache
from mllm_squeeze.upstream.names import USE_CACHE
from mllm_squeeze.upstream.outputs import hidden_of

# Tokens that are decoded one by one; what is in front of them is the prefill.
STEPS = 3
PREFILL = LENGTH - STEPS


@contextmanager
def running(parts: ModelParts, plan: Plan) -> Iterator[Attachment]:
    """Hook a text model for a plan inside the block."""
    attachment = Attachment(parts, plan, lambda prefill: None)
    try:
        attachment.attach()
        yield attachment
    finally:
        attachment.detach()


class Run:
    """A squeezed prefill and its decode steps; `states` are what each of them gave."""

    def __init__(
        self, parts: ModelParts, attachment: Attachment, plan: Plan, prompt: TrialPrompt, static: bool
    ) -> None:
        self.parts, self.attachment, self.prompt = parts, attachment, prompt
        self.cache = new_static(parts.text_config, LENGTH) if static else new_growing(parts.text_config)
        self.first = Prefill(plan, parts, prompt.layout(PREFILL), {}, torch.device("cpu"))
        self.states: list[Tensor] = []

    def prefill(self) -> None:
        """Run the tokens in front of those that are decoded."""
        self.states.append(self.attachment.run_with(self.first, lambda: self._pass(0, PREFILL)))

    def step(self, column: int) -> None:
        """Decode one token."""
        self.states.append(self._pass(column, column + 1))

    def _pass(self, start: int, stop: int) -> Tensor:
        given = with_cache(self.parts.decoder, self.prompt.columns(start, stop), self.cache)
        return hidden_of(self.parts.decoder(**given, **{USE_CACHE: True}))

    def kept(self) -> Tensor:
        """Return bool (B, LENGTH): survivors of the prefill, and all tokens behind it."""
        return torch.nn.functional.pad(self.first.kept, (0, STEPS), value=True)


def dense_states(parts: ModelParts, prompt: TrialPrompt) -> Tensor:
    """Return the states (B, LENGTH, D) of one pass of the text model as it is."""
    return hidden_of(parts.decoder(**prompt.given, **{USE_CACHE: False}))


def expected_states(parts: ModelParts, run: Run, layer: int, repack: bool) -> Tensor:
    """Return the states (B, LENGTH, D) of one pass without a cache.

    Where layers mix tokens without attention, masking has no meaning; then it is a cut without a cache.
    """
    if selfcheck.layers_without_attention(parts, layer):
        plan = run.first.plan
        with running(parts, plan) as attachment:
            prefill = Prefill(plan, parts, run.prompt.layout(), {}, torch.device("cpu"))
            return attachment.run_with(prefill, lambda: dense_states(parts, run.prompt))
    kept = run.kept()
    hooks = []
    for number in range(layer, len(parts.layers)):
        module = parts.layers[number]
        hooks.append(module.register_forward_pre_hook(selfcheck.closing(kept, module), with_kwargs=True))
        if repack:
            places = (kept & run.prompt.real).long().cumsum(1) - 1
            hook = _renumbering(parts, number, places.clamp(min=0))
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        return dense_states(parts, run.prompt)
    finally:
        for hook in hooks:
            hook.remove()


def _renumbering(parts: ModelParts, number: int, places: Tensor) -> Any:
    def renumber(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        call = LayerCall.read(args, kwargs)
        # A layer that is given no tables has no positions.
        rope = None if call.rope is None else parts.rotate(number, call.hidden, places)
        return call.replace(rope=rope).out()

    return renumber
