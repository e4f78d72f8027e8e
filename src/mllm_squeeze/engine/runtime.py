"""Puts the hooks on a model, runs a session in each pass, and takes everything off again."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mllm_squeeze.engine import cache as kv
from mllm_squeeze.engine import cutting, decoding, selfcheck, signals
from mllm_squeeze.engine.encoders import MARK, EncoderHooks
from mllm_squeeze.engine.fittings import Fittings
from mllm_squeeze.engine.frames import Frame, Local, features_of, layout_of, prompt_length
from mllm_squeeze.engine.plan import Plan, PlannedCut
from mllm_squeeze.engine.session import Session
from mllm_squeeze.engine.spans import Features
from mllm_squeeze.engine.streams import fold, unfold
from mllm_squeeze.engine.taps import Listener
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError, UnsupportedModelError
from mllm_squeeze.family.handlers.deepstack import follow_cuts, has_deepstack
from mllm_squeeze.family.handlers.inner_features import has_inner_features, take_inner_features
from mllm_squeeze.family.handlers.temperature import refuse_scaled
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import DecodeReducer


class Runtime:
    """The hooks of one handle on one model."""

    def __init__(self, parts: ModelParts, plan: Plan, publish: Callable[[Session], None]) -> None:
        self.parts, self.plan = parts, plan
        self.enabled = True
        self._publish = publish
        self._verified = parts.row.verified
        self._local = Local()
        self._fittings = Fittings()
        self._windowed = any(parts.window(number) for number in range(len(parts.layers)))
        self._chooses_rows = [
            cut
            for cut in plan.cuts
            if any(need.name == "attention" and need.rows == "chosen" for need in cut.reducer.needs())
        ]

    # Life

    def attach(self) -> None:
        """Hook the model; on an error everything is taken off again."""
        try:
            EncoderHooks(self.parts, self.plan, self._local, lambda: self.enabled).attach(self._fittings)
            self._override_generate()
            self._fittings.around(self.parts.base, self._enter_base, self._leave_base)
            self._fittings.around(self.parts.decoder, self._enter_decoder, self._leave_decoder)
            self._hook_layers()
            if has_deepstack(self.parts.decoder):
                self._fittings.add(follow_cuts(self.parts.decoder, self._kept_now))
            self._tap_decoder()
        except BaseException:
            self.detach()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.plan.refuse_copy()

    def detach(self) -> None:
        """Take off all hooks, taps and overrides; the model is as it was."""
        self._fittings.remove()

    def _hook_layers(self) -> None:
        first = self.plan.first
        if first is None:
            return
        from_start = self._chooses_rows or has_inner_features(self.parts.decoder)
        start = 0 if from_start else max(first - 1, 0)
        layers = self.parts.layers
        for number in range(start, len(layers)):
            before = functools.partial(self._before_layer, number)
            self._fittings.before(layers[number], before)
        # Ahead of hooks that record hidden states, so that they see the full length as HF promises for the last one.
        self._fittings.after(layers[-1], self._after_last_layer, first=True)

    def _tap_decoder(self) -> None:
        tapped: set[int] = set()
        for cut in self.plan.cuts:
            for need in cut.reducer.needs():
                if need.name not in ("attention", "keys"):
                    continue
                tapped.add(cut.layer if need.source == "next" else cut.layer - 1)
        if self.plan.decode is not None:
            tapped.add(self._decode.layer - 1)
        for number in sorted(tapped):
            attention = find_attention(self.parts.layers[number])
            if attention is None:
                raise UnsupportedModelError(
                    f"Layer {number} of {type(self.parts.decoder).__name__} has no attention to read. Choose another "
                    "layer."
                )
            self._fittings.tap(attention, functools.partial(self._decoder_listener, attention))

    @property
    def _decode(self) -> DecodeReducer:
        assert self.plan.decode is not None
        assert isinstance(self.plan.decode.reducer, DecodeReducer)
        return self.plan.decode.reducer

    def _kept_now(self) -> tuple[Tensor, Tensor | None] | None:
        session = self._local.session
        return None if session is None or session.index is None else (session.index, session.valid)

    def _decoder_listener(self, attention: nn.Module) -> Listener | None:
        session = self._local.session
        return None if session is None else session.listeners.get(attention)

    # generate()

    def _override_generate(self) -> None:
        original: Any = getattr(self.parts.model, "generate", None)
        if original is None:
            return

        # Assisted decoding feeds prompt and guesses in one pass; only generate() knows where the prompt ends.
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
            given = {**given.pop("kwargs", {}), **given.pop("generate_kwargs", {}), **given}
            before, self._local.prompt = self._local.prompt, prompt_length(given)
            if self.parts.row.own_generate:
                self._local.frames.enter(Frame(given))
            try:
                return original(*args, **kwargs)
            finally:
                self._local.prompt = before
                if self.parts.row.own_generate:
                    self._local.frames.leave()

        self._fittings.override(self.parts.model, "generate", generate)

    # The inner model

    def _enter_base(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs if args else kwargs
        frame = Frame(inputs)
        live = self._local.frames.enter(frame, kwargs)
        for modality, output in (inputs.get("mm_encoder_outputs") or {}).items():
            if output is None or not self.enabled:
                continue
            found = getattr(output, MARK, None)
            if found is None:
                raise UnsupportedInputError(
                    f"The {modality} features of this call were encoded without the handle, or the prompt is prefilled "
                    "in chunks. Encode them after squeeze.apply, and leave prefill_chunk_size unset."
                )
            if not self.parts.row.by_runs:
                frame.features[modality] = found
        return args, live

    def _leave_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._local.frames.leave()

    # The text model

    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        live = self._local.sessions.enter(None, kwargs)
        probe = self._local.probe
        session = probe[0] if probe is not None else self._start(module, kwargs)
        self._local.sessions.replace(session)
        if session is not None and session.cutting:
            given, session.inner = take_inner_features(kwargs)
            live.update(given)
        return args, live

    def _start(self, module: nn.Module, kwargs: dict[str, Any]) -> Session | None:
        """Return the session of a pass, None where there is nothing to cut and nothing was cut before."""
        states = kwargs.get("inputs_embeds")
        states = kwargs.get("input_ids") if states is None else states
        if states is None:
            return None
        past_key_values = kwargs.get("past_key_values")
        frame = self._local.frame
        past = _seen(past_key_values)
        # Where generate() itself is the frame, its later passes are decode steps.
        decodes = (self.parts.row.own_generate and past) or states.shape[1] == 1
        features = {} if decodes or frame is None or not self.enabled else features_of(frame, self.parts.ids)
        if not features and not _has_cut(past_key_values):
            if self.enabled and states.shape[1] > 1 and not past:
                _warn_no_image()
            return None
        layout = None
        if features and frame is not None:
            _refuse_packed(kwargs)
            layout = layout_of(frame, features, self.parts, states, past, self._local.prompt)
            if not layout.spans:
                # Some families are given their pictures again in later passes, which hold no placeholder.
                layout, features = None, {}
        if layout is None and (not _has_cut(past_key_values) or self._is_plain_step(states, kwargs)):
            return None
        refuse_scaled(self.parts.text_config, past + states.shape[1])
        session = Session(self.plan, self.parts, layout, features, states.shape[1], past)
        if layout is not None:
            session.prepare(states.device)
            self._check(module, layout, features, states.device, kwargs)
        return session

    def _is_plain_step(self, states: Tensor, kwargs: dict[str, Any]) -> bool:
        """True for a decode step in which no layer needs anything of us: one token, no mask, original positions."""
        if states.shape[1] > 1 or kwargs.get("attention_mask") is not None or self.plan.decode is not None:
            return False
        if self._windowed or self.parts.text_config._attn_implementation == "eager":
            return False
        return kv.serve_even(kwargs["past_key_values"])

    def _check(
        self,
        decoder: nn.Module,
        layout: TokenLayout,
        features: Mapping[str, Features],
        device: torch.device,
        kwargs: dict[str, Any],
    ) -> None:
        """Let a family nobody has tried prove, once, that a cut of it is exact."""
        layer = self.plan.first
        if self._verified or layer is None:
            return
        plain = {**kwargs, "past_key_values": None, "use_cache": False}
        session = selfcheck.probe_session(self.parts, layer, layout, features, device)
        try:
            with torch.no_grad():
                self._local.probe = (session,)
                short = decoder(**plain).last_hidden_state
                self._local.probe = (None,)
                masked = selfcheck.masked_run(self.parts, session, layer, plain)
        finally:
            self._local.probe = None
        selfcheck.compare(self.parts, session, short, masked)
        self._verified = True

    def _leave_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        session = self._local.sessions.leave()
        # A self-check is not what the user ran.
        if session is not None and session.cutting and output is not None and self._local.probe is None:
            self._publish(session)

    # Decoder layers

    def _before_layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        session = self._local.session
        if session is None:
            return None
        given = args[0] if args else kwargs["hidden_states"]
        hidden = fold(given)
        if session.cutting:
            if session.inner is not None:
                hidden = session.inner.add(number, hidden, session.index, session.valid)
            hidden = self._cut(session, number, hidden, kwargs)
            self._listen(session, number)
        elif self.plan.decode is not None and number == self._decode.layer - 1 and session.width == 1:
            decoding.listen(session, find_attention(module), self._decode, kwargs.get("past_key_values"))
        new = session.shorten(number, hidden, kwargs)
        session.lengths[number] = hidden.shape[1]
        session.held[number] = kv.held_entries(kwargs.get("past_key_values"), number)
        if new is kwargs and session.index is None and session.inner is None:
            return None
        hidden = unfold(hidden, given)
        if args:
            return (hidden, *(session.per_token(other) for other in args[1:])), new
        return args, {**new, "hidden_states": hidden}

    def _cut(self, session: Session, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        cuts = session.plan.at(number)
        merged = number == 0 and session.plan.encoder is not None
        if (cuts or merged) and kwargs.get("past_key_values") is not None:
            kv.require_cuttable(kwargs["past_key_values"])
        if number == 0:
            for cut in self._chooses_rows if session.plan is self.plan else ():
                cutting.choose_rows(session, cut, hidden)
            if session.plan.encoder is not None:
                hidden = cutting.cut_survivors(session, session.plan.encoder, hidden)
        for cut in cuts:
            hidden = cutting.run_cut(session, cut, hidden, kwargs)
        return hidden

    def _listen(self, session: Session, number: int) -> None:
        upcoming: list[PlannedCut] = list(session.plan.at(number + 1))
        for cut in upcoming:
            signals.listen(session, cut, self.parts.layers[number])

    def _after_last_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        session = self._local.session
        if session is None or session.index is None:
            return None
        if isinstance(output, tuple):
            return (session.restore(output[0]), *output[1:])
        return unfold(session.restore(fold(output)), output)


def _seen(past_key_values: Any) -> int:
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def _has_cut(past_key_values: Any) -> bool:
    layers = getattr(past_key_values, "layers", ())
    return any(isinstance(layer, kv.CutLayerMixin) for layer in layers)


def _refuse_packed(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("cu_seq_lens_q") is not None:
        raise UnsupportedInputError(
            "Packed inputs (several prompts in one row, cu_seq_lens_q) cannot be squeezed. Pass a padded batch with an "
            "attention_mask."
        )


def _warn_no_image() -> None:
    warnings.warn(
        "This prompt holds no image, video or audio that the handle saw being encoded; nothing was cut.",
        SqueezeWarning,
        stacklevel=2,
    )
