"""Puts the hooks on a model, runs a session in each pass, and takes everything off again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mllm_squeeze.engine import cut as cutting
from mllm_squeeze.engine.decode import choice as decoding
from mllm_squeeze.engine.decode.static_step import is_static_step, is_traced_step, refuse_static, serve_step, untraced
from mllm_squeeze.engine.hooks import listening
from mllm_squeeze.engine.hooks import self_check as selfcheck
from mllm_squeeze.engine.hooks.calls import CallHooks
from mllm_squeeze.engine.hooks.cross_attention import CrossAttentionHooks
from mllm_squeeze.engine.hooks.current import Local, features_of, layout_of, warn_no_image
from mllm_squeeze.engine.hooks.encoder import EncoderHooks
from mllm_squeeze.engine.hooks.installer import Fittings, HookOwner
from mllm_squeeze.engine.hooks.qformer import QueryHooks
from mllm_squeeze.engine.hooks.switch import Switch
from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.session import Session
from mllm_squeeze.engine.sequence.streams import fold, unfold
from mllm_squeeze.engine.signals import preview
from mllm_squeeze.engine.signals.rows import AttentionCall, Listener
from mllm_squeeze.engine.signals.source import Spot
from mllm_squeeze.engine.signals.sources import Sources
from mllm_squeeze.engine.tokens.spans import Features
from mllm_squeeze.errors import SqueezeError, UnsupportedInputError, UnsupportedModelError
from mllm_squeeze.family.handlers.deepstack import follow_cuts, has_deepstack
from mllm_squeeze.family.handlers.inner_features import has_inner_features, take_inner_features
from mllm_squeeze.family.handlers.temperature import refuse_scaled
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import DecodeReducer
from mllm_squeeze.reducers.needs import Attention
from mllm_squeeze.upstream.attention import implementation
from mllm_squeeze.upstream.calls import LayerCall, TextCall
from mllm_squeeze.upstream.names import POSITIONS
from mllm_squeeze.upstream.versions import installed

R = TypeVar("R")


class Runtime(HookOwner):
    """The hooks of one handle on one model, which keep it alive as long as they are there.

    publish: gets the session of each prefill when it ends, None for a prompt without visual tokens.
    """

    def __init__(self, parts: ModelParts, plan: Plan, publish: Callable[[Session | None], None]) -> None:
        self.parts, self.plan = parts, plan
        self.switch = Switch()
        self._publish = publish
        self._verified = parts.row.verified
        self._local = Local()
        self._fittings = Fittings()
        self._windowed = any(parts.window(number) for number in range(len(parts.layers)))
        self._sources = Sources(plan, parts)
        self._chooses_rows = [
            cut
            for cut in plan.cuts
            if any(isinstance(need, Attention) and need.rows == "chosen" for need in cut.reducer.needs())
        ]

    # Life

    def attach(self) -> None:
        """Hook the model; on an error everything is taken off again."""
        try:
            EncoderHooks(self.parts, self.plan, self._local, self.switch.is_on).attach(self._fittings)
            CallHooks(self.parts, self.plan, self._local, self.switch.is_on).attach(self._fittings)
            if self.plan.keys:
                self._attach_keys()
            else:
                self._attach_decoder()
        except BaseException:
            self.detach()
            raise

    def _attach_decoder(self) -> None:
        """Cut what stands in the LLM's sequence."""
        self._fittings.around(self.parts.decoder, self._enter_decoder, self._leave_decoder)
        self._hook_layers()
        if has_deepstack(self.parts.decoder):
            self._fittings.add(follow_cuts(self.parts.decoder, self._kept_now))
        self._tap_decoder()

    def _attach_keys(self) -> None:
        """Cut what is attended to from outside: by the text, or by the queries of a Q-Former."""
        if self.parts.cross_attention:
            hooks = CrossAttentionHooks(self.parts, self.plan, self._local, self.switch.is_on, self._finish)
            hooks.attach(self._fittings)
        else:
            QueryHooks(self.parts, self.plan, self.switch.is_on, self._finish).attach(self._fittings)

    def detach(self) -> None:
        """Take off all hooks, taps and overrides; the model is as it was."""
        self._fittings.remove()

    def _hook_layers(self) -> None:
        first = self.plan.first
        if first is None:
            return
        from_start = self._chooses_rows or has_inner_features(self.parts.decoder)
        read = self._sources.first_layer
        start = 0 if from_start else max(first if read is None else min(first, read), 0)
        layers = self.parts.layers
        for number in range(start, len(layers)):
            before = functools.partial(self._before_layer, number)
            self._fittings.before(layers[number], before)
        # Ahead of hooks that record hidden states, so that they see the full length as HF promises for the last one.
        self._fittings.after(layers[-1], self._after_last_layer, first=True)

    def _tap_decoder(self) -> None:
        spots = self._sources.spots
        heard = {spot.module: functools.partial(self._hear, spot) for spot in spots if spot.side == "call"}
        tapped = {number for number in range(len(self.parts.layers)) if number in self._sources.previewed}
        if self.plan.decode is not None:
            tapped.add(self._decode.layer - 1)
        modules = dict.fromkeys(heard)
        for number in sorted(tapped):
            attention = find_attention(self.parts.layers[number])
            if attention is None:
                raise UnsupportedModelError(
                    f"Layer {number} of {type(self.parts.decoder).__name__} has no attention to read. Choose another "
                    "layer."
                )
            modules[attention] = None
            if number in self._sources.previewed:
                preview.put_on(self._fittings, attention, self._session)
        for module in modules:
            self._fittings.tap(module, functools.partial(self._decoder_listener, module, heard.get(module)))
        listening.put_on(self._fittings, self._sources, self._session)

    @property
    def _decode(self) -> DecodeReducer:
        assert self.plan.decode is not None
        assert isinstance(self.plan.decode.reducer, DecodeReducer)
        return self.plan.decode.reducer

    def _kept_now(self) -> tuple[Tensor, Tensor | None] | None:
        session = self._local.session
        return None if session is None or session.index is None else (session.index, session.valid)

    def _session(self) -> Session | None:
        return self._local.session

    def _decoder_listener(self, attention: nn.Module, heard: Listener | None) -> Listener | None:
        session = self._local.session
        if session is None:
            return None
        return session.listeners.get(attention, heard if session.cutting else None)

    def _hear(self, spot: Spot, call: AttentionCall) -> bool:
        session = self._local.session
        assert session is not None
        self._sources.hear_attention(session, spot, call)
        return False

    def _finish(self, session: Session | None) -> None:
        """Hand on a prefill that ended, None where it had no visual tokens."""
        self._publish(session)

    # The text model

    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_traced_step(kwargs):
            return None
        call = TextCall.read(module, args, kwargs)
        live = dict(call.named)
        entry = self._local.sessions.enter(None)
        probe = self._local.probe
        session = probe[0] if probe is not None else self._start(call, live)
        entry.value = session
        if session is not None and session.cutting:
            given, session.inner = take_inner_features(live)
            live.update(given)
        return (), live

    @untraced
    def _start(self, call: TextCall, live: dict[str, Any]) -> Session | None:
        """Return the session of a pass, None where its layers need nothing of us.

        live: arguments of the text model that go on to it; positions of a decode step may change in them.
        """
        if is_static_step(call.named):
            return None
        frame = self._local.frame
        past = kv.tokens_seen(call.cache)
        # Where generate() itself is the frame, its later passes are decode steps.
        decodes = (self.parts.row.own_generate and past) or call.width == 1
        features = {} if decodes or frame is None or not self.switch.is_on() else features_of(frame, self.parts.ids)
        if not features and not kv.is_cut(call.cache):
            if self.switch.is_on() and call.width > 1 and not past:
                self._finish(None)
                warn_no_image()
            return None
        layout = None
        if features and frame is not None:
            _refuse_packed(call)
            _refuse_recomputed(self.parts)
            layout = layout_of(frame, features, self.parts, call, past, self._local.prompt)
            if not layout.spans:
                # Some families are given their pictures again in later passes, which hold no placeholder.
                layout, features = None, {}
        if layout is None and (not kv.is_cut(call.cache) or self._is_plain_step(call, live)):
            return None
        refuse_scaled(self.parts.text_config, past + call.width)
        session = Session(self.plan, self.parts, layout, features, call.width, past)
        if layout is not None:
            session.prepare(call.states.device)
            session.wanted = self._local.wanted
            self._check(layout, features, call)
        return session

    def _is_plain_step(self, call: TextCall, live: dict[str, Any]) -> bool:
        """True for a decode step in which no layer needs anything of us: one token, none padded, positions alike."""
        if call.width > 1 or self.plan.decode is not None:
            return False
        if self._windowed or implementation(self.parts.text_config) == "eager":
            return False
        if not _is_open(call.mask, kv.tokens_seen(call.cache) + 1):
            return False
        if kv.serve_even(call.cache):
            return True
        if not isinstance(call.positions, Tensor) or call.positions.ndim != 2:
            return False
        shift = kv.serve_shifted(call.cache)
        if shift is None:
            return False
        live[POSITIONS] = call.positions - shift.to(call.positions.device)[:, None]
        return True

    def _check(self, layout: TokenLayout, features: Mapping[str, Features], call: TextCall) -> None:
        """Let a family nobody has tried prove, once, that a cut of it is exact."""
        layer = self.plan.first
        if self._verified or layer is None:
            return
        try:
            proof = self.prove(layer, layout, features, call)
        except SqueezeError:
            raise
        # The code of a model that nobody has tried may raise anything when it is cut.
        except Exception as error:
            raise selfcheck.needs_handler(
                self.parts, f"a cut, or its mask, raises {type(error).__name__}: {error}"
            ) from error
        selfcheck.require_alike(self.parts, proof)
        self._verified = True

    def run_with(self, session: Session | None, function: Callable[[], R]) -> R:
        """Call the text model with a session made by hand; with None it runs dense.

        function: calls the text model.
        """
        entry = self._local.probes.enter((session,), sys._getframe())
        try:
            return function()
        finally:
            self._local.probes.leave(entry)

    def prove(
        self, layer: int, layout: TokenLayout, features: Mapping[str, Features], call: TextCall
    ) -> selfcheck.Proof:
        """Compare a cut with masking the same tokens. See `selfcheck.prove`."""
        return selfcheck.prove(self.parts, self._local, self._fittings, layer, layout, features, call)

    def _leave_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if is_traced_step(kwargs):
            return
        session = self._local.sessions.leave()
        # A self-check is not what the user ran.
        if session is not None and session.cutting and output is not None and self._local.probe is None:
            self._finish(session)

    # Decoder layers

    def _before_layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        session, call = self._local.session, LayerCall.read(args, kwargs)
        new = serve_step(self.parts, number, call) if session is None else self._run_before(session, number, call)
        return None if new is None else new.out()

    @untraced
    def _run_before(self, session: Session, number: int, call: LayerCall) -> LayerCall | None:
        """Cut in front of a layer, and return its call on what is left; None where it is as it came."""
        hidden = fold(call.hidden)
        if session.cutting:
            if session.inner is not None:
                hidden = session.inner.add(number, hidden, session.index, session.valid)
            hidden = self._cut(session, number, hidden, call)
            self._sources.enter(session, number, hidden)
        elif self.plan.decode is not None and number == self._decode.layer - 1 and session.width == 1:
            decoding.listen(session, find_attention(self.parts.layers[number]), self._decode, call.cache)
        new = session.arguments.shorten(number, hidden, call)
        session.lengths[number] = hidden.shape[1]
        session.held[number] = kv.held_entries(call.cache, number, session.past)
        if new is call and session.index is None and session.inner is None:
            return None
        others = tuple(session.arguments.per_token(other) for other in call.others)
        return new.replace(hidden=unfold(hidden, call.hidden), others=others)

    def _cut(self, session: Session, number: int, hidden: Tensor, call: LayerCall) -> Tensor:
        cuts, stage = session.plan.at(number), session.stage
        if number == 0:
            self._sources.start(session, hidden)
            for cut in self._chooses_rows if session.plan is self.plan else ():
                cutting.choose_rows(session, cut, hidden)
            if session.plan.encoder is not None:
                hidden = cutting.cut_survivors(session, session.plan.encoder, hidden)
        for cut in cuts:
            hidden = cutting.run_cut(session, cut, hidden, call)
        # A cut that removes nothing asks nothing of the cache.
        if session.stage > stage and call.cache is not None:
            kv.require_cuttable(call.cache)
            refuse_static(session, call.cache)
        self._sources.forget(session, number)
        return hidden

    def _after_last_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        session = self._local.session
        if session is None or session.index is None:
            return None
        if isinstance(output, tuple):
            return (session.restore(output[0]), *output[1:])
        return unfold(session.restore(fold(output)), output)


def _is_open(mask: Any, tokens: int) -> bool:
    """True where a text model closes none of so many tokens; read from the device, as the library does itself."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == tokens and bool(mask.all())


def _refuse_packed(call: TextCall) -> None:
    if call.packed:
        raise UnsupportedInputError(
            "Packed inputs (several prompts in one row, cu_seq_lens_q) cannot be squeezed. Pass a padded batch with an "
            "attention_mask."
        )


def _refuse_recomputed(parts: ModelParts) -> None:
    """Before 5.23 transformers runs hooks again when the backward pass recomputes a layer, outside of any call."""
    layer = parts.layers[0]
    inside = type(layer).__call__ is not nn.Module.__call__
    if inside and torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise UnsupportedInputError(
            f"transformers {installed()} recomputes layers together with their hooks, so a squeezed model "
            "cannot be trained with gradient checkpointing. Call model.gradient_checkpointing_disable(), or install "
            "transformers 5.23 or newer."
        )
