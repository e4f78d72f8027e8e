"""Puts the hooks of a handle on a model, and takes everything off again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

from mllm_squeeze.engine.hooks import self_check
from mllm_squeeze.engine.hooks.calls import CallHooks
from mllm_squeeze.engine.hooks.cross_attention import CrossAttentionHooks
from mllm_squeeze.engine.hooks.current import Local
from mllm_squeeze.engine.hooks.decoder import DecoderHooks
from mllm_squeeze.engine.hooks.encoded import EncodedHooks
from mllm_squeeze.engine.hooks.encoder import EncoderHooks
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.layers import LayerHooks
from mllm_squeeze.engine.hooks.owner import HookOwner, Hooks, Publish
from mllm_squeeze.engine.hooks.qformer import QueryHooks
from mllm_squeeze.engine.hooks.requests import Requests
from mllm_squeeze.engine.hooks.sound import SoundHooks
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.upstream.calls import TextCall

R = TypeVar("R")


class Attachment(HookOwner):
    """The hooks of one handle on one model, which keep it alive as long as they are there.

    publish: gets each prefill when it ends, None for a prompt without visual tokens. requests: those of the
    handle, which outlast a switch of its method.
    """

    def __init__(self, parts: ModelParts, plan: Plan, publish: Publish, requests: Requests | None = None) -> None:
        super().__init__(plan)
        self.parts = parts
        self.requests = Requests(plan) if requests is None else requests
        self._publish = publish
        self._local = Local()
        self._installer = Installer()

    def attach(self) -> None:
        """Hook the model; on an error everything is taken off again."""
        try:
            for kind in self._kinds():
                kind(self.parts, self.plan, self._local, self.requests, self._hand_on).attach(self._installer)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take off all hooks, taps and overrides; the model is as it was."""
        self._installer.remove()

    def _kinds(self) -> tuple[type[Hooks], ...]:
        """Return the hooks that the plan needs, in the order in which they are put on."""
        if not self.plan.keys:
            return EncoderHooks, SoundHooks, CallHooks, DecoderHooks, LayerHooks
        # What is cut there is attended to from outside: by the text, or by the queries of a Q-Former.
        if self.parts.row.encoded:
            return CallHooks, EncodedHooks
        return EncoderHooks, CallHooks, CrossAttentionHooks if self.parts.cross_attention else QueryHooks

    def _hand_on(self, prefill: Prefill | None) -> None:
        """Hand a prefill on; the hooks hold this method, and with it the attachment."""
        self._publish(prefill)

    def run_with(self, prefill: Prefill | None, function: Callable[[], R]) -> R:
        """Call the text model with a prefill made by hand; with None it runs dense.

        function: calls the text model.
        """
        entry = self._local.probes.enter((prefill,), sys._getframe())
        try:
            return function()
        finally:
            self._local.probes.leave(entry)

    def prove(
        self, layer: int, layout: TokenLayout, features: Mapping[str, Features], call: TextCall
    ) -> self_check.Proof:
        """Compare a cut with masking the same tokens. See `self_check.prove`."""
        return self_check.prove(self.parts, self._local, self._installer, layer, layout, features, call)
