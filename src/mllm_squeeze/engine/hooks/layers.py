"""Hooks on the decoder layers: what stands in front of each is cut, and each is given what fits the tokens left."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine import cut as cutting
from mllm_squeeze.engine.decode import choice as decoding
from mllm_squeeze.engine.decode.static_step import refuse_static, serve_step
from mllm_squeeze.engine.hooks import listening, preview
from mllm_squeeze.engine.hooks.current import Local
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks, Publish
from mllm_squeeze.engine.hooks.requests import Requests
from mllm_squeeze.engine.hooks.untraced import untraced
from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.plan import Plan, PlannedCut
from mllm_squeeze.engine.sequence.passes import Pass
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.sequence.streams import fold, unfold
from mllm_squeeze.engine.signals.rows import AttentionCall, Listener
from mllm_squeeze.engine.signals.source import Spot
from mllm_squeeze.engine.signals.sources import Sources, chooses_rows
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.handlers.inner_features import has_inner_features
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.reducers.base import DecodeReducer
from mllm_squeeze.upstream.calls import LayerCall


class LayerHooks(Hooks):
    """Runs what a pass needs in front of each layer, and behind the last one."""

    def __init__(self, parts: ModelParts, plan: Plan, local: Local, requests: Requests, publish: Publish) -> None:
        super().__init__(parts, plan, local, requests, publish)
        self._decode = None if plan.decode is None else _while_decoding(plan.decode)
        self._sources = Sources(plan, parts)
        self._chooses_rows = any(chooses_rows(cut) for cut in plan.cuts)

    def attach(self, installer: Installer) -> None:
        """Put the hooks on.

        Raises:
            UnsupportedModelError: a layer whose attention the plan reads has none.
        """
        self._hook_layers(installer)
        self._tap_attention(installer)

    def _hook_layers(self, installer: Installer) -> None:
        first = self.plan.first
        if first is None:
            return
        from_start = self._chooses_rows or has_inner_features(self.parts.decoder)
        read = self._sources.first_layer
        start = 0 if from_start else first if read is None else min(first, read)
        if self._decode is not None:
            start = min(start, self._decode.layer - 1)
        layers = self.parts.layers
        for number in range(start, len(layers)):
            before = functools.partial(self._before_layer, number)
            installer.before(layers[number], before)
        # Ahead of hooks that record hidden states, so that they see the full length as HF promises for the last one.
        installer.after(layers[-1], self._after_last_layer, first=True)

    def _tap_attention(self, installer: Installer) -> None:
        # What reads a call of each module's attention function, None where only previews and decode steps do.
        tapped: dict[nn.Module, Listener | None] = {
            spot.module: functools.partial(self._hear, spot) for spot in self._sources.spots if spot.side == "call"
        }
        for number in self._sources.previewed:
            attention = self._attention(number)
            tapped.setdefault(attention, None)
            preview.put_on(installer, attention, self._running)
        if self._decode is not None:
            tapped.setdefault(self._attention(self._decode.layer - 1), None)
        for module, heard in tapped.items():
            installer.tap(module, functools.partial(self._listener, module, heard))
        listening.put_on(installer, self._sources, self._running)

    def _attention(self, number: int) -> nn.Module:
        found = find_attention(self.parts.layers[number])
        if found is None:
            raise UnsupportedModelError(
                f"Layer {number} of {type(self.parts.decoder).__name__} has no attention to read. Choose another layer."
            )
        return found

    def _running(self) -> Pass | None:
        return self._local.running

    def _listener(self, attention: nn.Module, heard: Listener | None) -> Listener | None:
        running = self._local.running
        if running is None:
            return None
        return running.signals.listeners.get(attention, heard if isinstance(running, Prefill) else None)

    def _hear(self, spot: Spot, call: AttentionCall) -> bool:
        prefill = self._local.running
        assert isinstance(prefill, Prefill)
        self._sources.hear_attention(prefill, spot, call)
        return False

    # In front of a layer

    def _before_layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        running, call = self._local.running, LayerCall.read(args, kwargs)
        new = serve_step(self.parts, number, call) if running is None else self._run_before(running, number, call)
        return None if new is None else new.out()

    @untraced
    def _run_before(self, running: Pass, number: int, call: LayerCall) -> LayerCall | None:
        """Cut in front of a layer, and return its call on what is left; None where it is as it came."""
        folded = hidden = fold(call.hidden)
        if isinstance(running, Prefill):
            hidden = self._cut(running, number, running.with_inner(number, hidden), call)
        elif self._decode is not None and number == self._decode.layer - 1 and running.width == 1:
            decoding.listen(running, find_attention(self.parts.layers[number]), self._decode, call.cache)
        new = running.arguments.shorten(number, hidden, call)
        if isinstance(running, Prefill):
            self._sources.enter(running, number, hidden, new.rope)
        running.lengths[number] = hidden.shape[1]
        running.held[number] = kv.held_entries(call.cache, number, running.past)
        if new is call and running.left is None and hidden is folded:
            return None
        others = tuple(running.arguments.per_token(other) for other in call.others)
        routing = running.arguments.per_token(call.routing)
        return new.replace(hidden=unfold(hidden, call.hidden), routing=routing, others=others)

    def _cut(self, prefill: Prefill, number: int, hidden: Tensor, call: LayerCall) -> Tensor:
        cuts, stage = prefill.plan.at(number), prefill.stage
        if number == 0:
            self._sources.start(prefill, hidden)
            self._choose_rows(prefill, hidden)
            if prefill.plan.encoder is not None:
                hidden = cutting.cut_survivors(prefill, prefill.plan.encoder, hidden)
        for cut in cuts:
            hidden = cutting.run_cut(prefill, cut, hidden, call)
        # A cut that removes nothing asks nothing of the cache.
        if prefill.stage > stage and call.cache is not None:
            kv.require_cuttable(call.cache)
            refuse_static(prefill, call.cache)
        self._sources.forget(prefill, number)
        return hidden

    def _choose_rows(self, prefill: Prefill, hidden: Tensor) -> None:
        # A self-check runs other cuts, which no source was made for.
        if self._chooses_rows and prefill.plan.is_of(self.plan):
            for cut in prefill.plan.cuts:
                if chooses_rows(cut):
                    cutting.choose_rows(prefill, cut, hidden)

    def _after_last_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        prefill = self._local.running
        if not isinstance(prefill, Prefill) or prefill.left is None:
            return None
        if isinstance(output, tuple):
            return (prefill.restore(output[0]), *output[1:])
        return unfold(prefill.restore(fold(output)), output)


def _while_decoding(planned: PlannedCut) -> DecodeReducer:
    if not isinstance(planned.reducer, DecodeReducer):
        raise ConfigError(f"'{planned.name}' cannot act while decoding: {type(planned.reducer).__name__} acts once.")
    return planned.reducer
