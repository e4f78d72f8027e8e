"""Puts the hooks on a model, runs a session in each pass, and takes everything off again."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mllm_squeeze.engine import cache as kv
from mllm_squeeze.engine import cutting, decoding, selfcheck, signals
from mllm_squeeze.engine.encode import EncodeCall
from mllm_squeeze.engine.encoder import EncoderMerge
from mllm_squeeze.engine.plan import Plan, PlannedCut
from mllm_squeeze.engine.session import Session
from mllm_squeeze.engine.spans import Features, find_layout
from mllm_squeeze.engine.streams import fold, unfold
from mllm_squeeze.engine.taps import Listener, Tap
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError, UnsupportedModelError
from mllm_squeeze.family.handlers.deepstack import follow_cuts, has_deepstack
from mllm_squeeze.family.handlers.inner_features import has_inner_features, take_inner_features
from mllm_squeeze.family.handlers.temperature import refuse_scaled
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import DecodeReducer

_MARK = "mllm_squeeze_features"
# Arguments that bring a modality into a prompt.
_INPUTS = {
    "image": ("pixel_values", "image_pixel_values"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "audio_input_features", "input_values"),
}


@dataclass
class _Frame:
    """One call of the inner model: its inputs, and the features that its encoders gave."""

    inputs: Mapping[str, Any]
    features: dict[str, Features] = field(default_factory=dict)


class _Local(threading.local):
    """What runs in this thread now; threads that share a model do not meet."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.sessions: list[Session | None] = []
        self.encode: EncodeCall | None = None
        # The session of a self-check that runs now: the text model is called inside its own pre-hook.
        self.probe: tuple[Session | None] | None = None
        # Length of the prompt that generate() was called with, None outside of it.
        self.prompt: int | None = None


class Runtime:
    """The hooks of one handle on one model."""

    def __init__(self, parts: ModelParts, plan: Plan, publish: Callable[[Session], None]) -> None:
        self.parts, self.plan = parts, plan
        self.enabled = True
        self._publish = publish
        self._verified = parts.row.verified
        self._local = _Local()
        self._hooks: list[RemovableHandle] = []
        self._taps: list[Tap] = []
        self._overridden: list[tuple[nn.Module, str]] = []
        self._undo: list[Callable[[], None]] = []
        self._encoder_signals = frozenset(name for name in ("saliency", "encoder_keys") if plan.needs(name))
        self._chooses_rows = [
            cut
            for cut in plan.cuts
            if any(need.name == "attention" and need.rows == "chosen" for need in cut.reducer.needs())
        ]

    # Life

    def attach(self) -> None:
        """Hook the model; on an error everything is taken off again."""
        try:
            self._override_features()
            self._override_generate()
            self._hook(self.parts.base, self._enter_base, self._leave_base)
            self._hook(self.parts.decoder, self._enter_decoder, self._leave_decoder)
            self._hook_layers()
            self._follow_deepstack()
            self._hook_encoder()
            self._tap_decoder()
            self._tap_encoder()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take off all hooks, taps and overrides; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        for tap in reversed(self._taps):
            tap.close()
        for module, name in self._overridden:
            del module.__dict__[name]
        for undo in self._undo:
            undo()
        self._hooks, self._taps, self._overridden, self._undo = [], [], [], []

    def _hook(self, module: nn.Module, before: Any, after: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def _hook_layers(self) -> None:
        first = self.plan.first
        if first is None:
            return
        from_start = self._chooses_rows or has_inner_features(self.parts.decoder)
        start = 0 if from_start else max(first - 1, 0)
        layers = self.parts.layers
        for number in range(start, len(layers)):
            before = functools.partial(self._before_layer, number)
            self._hooks.append(layers[number].register_forward_pre_hook(before, with_kwargs=True))
        # Ahead of hooks that record hidden states, so that they see the full length as HF promises for the last one.
        self._hooks.append(layers[-1].register_forward_hook(self._after_last_layer, prepend=True))

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
            self._tap(attention, functools.partial(self._decoder_listener, attention))

    @property
    def _decode(self) -> DecodeReducer:
        assert self.plan.decode is not None
        assert isinstance(self.plan.decode.reducer, DecodeReducer)
        return self.plan.decode.reducer

    def _follow_deepstack(self) -> None:
        if has_deepstack(self.parts.decoder):
            self._undo.append(follow_cuts(self.parts.decoder, self._kept_now))

    def _kept_now(self) -> tuple[Tensor, Tensor | None] | None:
        session = self._session
        return None if session is None or session.index is None else (session.index, session.valid)

    def _hook_encoder(self) -> None:
        last, blocks, projector = self.parts.feature_block, self.parts.blocks, self.parts.projector
        if self.plan.encoder is None or blocks is None or projector is None or last is None:
            return
        for number in (block - 1 for block in self.plan.encoder_blocks or range(1, last + 1)):
            attention = find_attention(blocks[number])
            if attention is None:
                raise UnsupportedModelError(
                    f"Block {number} of the vision encoder has no attention whose keys can be read."
                )
            self._tap(attention, self._merge_listener)
            before = functools.partial(self._before_block, number + 1)
            self._hooks.append(blocks[number + 1].register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(projector.register_forward_hook(self._after_projector))

    def _merge_listener(self) -> Listener | None:
        merge = None if self._local.encode is None else self._local.encode.merge
        return None if merge is None else merge.read

    def _before_block(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        merge = None if self._local.encode is None else self._local.encode.merge
        if merge is None:
            return None
        hidden = merge.merge(number, args[0] if args else kwargs["hidden_states"])
        new = dict(kwargs)
        bias = merge.bias
        rest = args[1:]
        if bias is not None:
            bias = bias.to(hidden.dtype)
            rest, new = ((bias, *args[2:]), new) if len(args) > 1 else (rest, {**new, "attention_mask": bias})
        return ((hidden, *rest), new) if args else (args, {**new, "hidden_states": hidden})

    def _after_projector(self, module: nn.Module, args: Any, output: Any) -> Any:
        merge = None if self._local.encode is None else self._local.encode.merge
        return None if merge is None else merge.restore(output)

    def _tap_encoder(self) -> None:
        block = self.parts.saliency_block
        if not self._encoder_signals:
            return
        attention = None if block is None or self.parts.blocks is None else find_attention(self.parts.blocks[block])
        if attention is None:
            raise UnsupportedModelError(
                f"The vision encoder of '{self.parts.row.model_type}' has no attention that could be read. Use a "
                "method that needs no encoder signal (fastv, divprune)."
            )
        self._tap(attention, self._encoder_listener)

    def _tap(self, attention: nn.Module, listener: Callable[[], Listener | None]) -> None:
        self._taps.append(Tap(attention, listener))

    def _decoder_listener(self, attention: nn.Module) -> Listener | None:
        session = self._session
        return None if session is None else session.listeners.get(attention)

    def _encoder_listener(self) -> Listener | None:
        return None if self._local.encode is None else self._local.encode.read

    @property
    def _session(self) -> Session | None:
        return self._local.sessions[-1] if self._local.sessions else None

    # Encoders

    def _override_features(self) -> None:
        # Audio needs no override: it is encoded in each forward, and a run of placeholders is one recording.
        for modality in (modality for modality in self.parts.ids if modality != "audio"):
            name = f"get_{modality}_features"
            original = getattr(self.parts.base, name, None)
            if original is not None:
                self._override(self.parts.base, name, self._recording(modality, original))

    def _override(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        if name in module.__dict__:
            raise UnsupportedModelError(
                f"{name} of this {type(module).__name__} was replaced on the instance by other code. Remove that "
                "patch, or squeeze first."
            )
        module.__dict__[name] = method
        self._overridden.append((module, name))

    def _override_generate(self) -> None:
        original: Any = getattr(self.parts.model, "generate", None)
        if original is None:
            return

        # Assisted decoding feeds prompt and guesses in one pass; only generate() knows where the prompt ends.
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
            given = {**given.pop("kwargs", {}), **given.pop("generate_kwargs", {}), **given}
            before, self._local.prompt = self._local.prompt, _prompt_length(given)
            if self.parts.row.own_generate:
                self._local.frames.append(_Frame(given))
            try:
                return original(*args, **kwargs)
            finally:
                self._local.prompt = before
                if self.parts.row.own_generate:
                    self._local.frames.pop()

        self._override(self.parts.model, "generate", generate)

    def _recording(self, modality: str, original: Callable[..., Any]) -> Callable[..., Any]:
        # generate() reads the signature, which `wraps` keeps.
        @functools.wraps(original)
        def record(*args: Any, **kwargs: Any) -> Any:
            # Some families encode videos through their image method: the outer call is the one that counts.
            if not self.enabled or self._local.encode is not None:
                return original(*args, **kwargs)
            inputs = inspect.signature(original).bind_partial(*args, **kwargs).arguments
            inputs = {**inputs.pop("kwargs", {}), **inputs}
            if modality == "video":
                inputs.setdefault("pixel_values_videos", inputs.get("pixel_values"))
            call = EncodeCall(self.parts, modality, self._encoder_signals, self._merge_for(modality))
            self._local.encode = call
            try:
                output = original(*args, **kwargs)
            finally:
                self._local.encode = None
            if isinstance(output, tuple):
                return output
            found = call.features(inputs, output)
            setattr(output, _MARK, found)
            if self._local.frames and not self.parts.row.by_runs:
                self._local.frames[-1].features[modality] = found
            return output

        return record

    def _merge_for(self, modality: str) -> EncoderMerge | None:
        last = self.parts.feature_block
        if self.plan.encoder is None or last is None:
            return None
        if modality == "video" and self.parts.row.road != "identity":
            warnings.warn(
                f"'{self.plan.encoder.name}' leaves videos alone in '{self.parts.row.model_type}', which pools their "
                "tokens behind the encoder; use vidcom2 or dycoke for them.",
                SqueezeWarning,
                stacklevel=2,
            )
            return None
        blocks = self.plan.encoder_blocks or tuple(range(1, last + 1))
        return EncoderMerge(self.parts, self.plan.encoder.reducer, blocks)

    # The inner model

    def _enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs if args else kwargs
        frame = _Frame(inputs)
        self._local.frames.append(frame)
        for modality, output in (inputs.get("mm_encoder_outputs") or {}).items():
            if output is None or not self.enabled:
                continue
            found = getattr(output, _MARK, None)
            if found is None:
                raise UnsupportedInputError(
                    f"The {modality} features of this call were encoded without the handle, or the prompt is prefilled "
                    "in chunks. Encode them after squeeze.apply, and leave prefill_chunk_size unset."
                )
            if not self.parts.row.by_runs:
                frame.features[modality] = found

    def _leave_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._local.frames.pop()

    # The text model

    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._local.sessions.append(None if self._local.probe is None else self._local.probe[0])
        session = None if self._local.probe is not None else self._start(module, kwargs)
        if session is None:
            return None
        self._local.sessions[-1] = session
        if not session.cutting:
            return None
        kwargs, session.inner = take_inner_features(kwargs)
        return args, kwargs

    def _start(self, module: nn.Module, kwargs: dict[str, Any]) -> Session | None:
        """Return the session of a pass, None where there is nothing to cut and nothing was cut before."""
        states = kwargs.get("inputs_embeds")
        states = kwargs.get("input_ids") if states is None else states
        if states is None:
            return None
        past_key_values = kwargs.get("past_key_values")
        frame = self._local.frames[-1] if self._local.frames else None
        past = _seen(past_key_values)
        # Where generate() itself is the frame, its later passes are decode steps.
        decodes = (self.parts.row.own_generate and past) or states.shape[1] == 1
        features = {} if decodes else self._features(frame)
        if not features and not _has_cut(past_key_values):
            if self.enabled and states.shape[1] > 1 and not past:
                _warn_no_image()
            return None
        layout = None
        if features and frame is not None:
            _refuse_packed(kwargs)
            layout = self._layout(frame, features, states, past)
            if not layout.spans:
                # Some families are given their pictures again in later passes, which hold no placeholder.
                layout, features = None, {}
        if layout is None and not _has_cut(past_key_values):
            return None
        refuse_scaled(self.parts.text_config, past + states.shape[1])
        session = Session(self.plan, self.parts, layout, features, states.shape[1], past)
        if layout is not None:
            session.prepare(states.device)
            self._check(module, layout, features, states.device, kwargs)
        return session

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

    def _features(self, frame: _Frame | None) -> dict[str, Features]:
        """Return what was encoded for this pass; what is encoded without a feature method is told by its inputs."""
        if frame is None or not self.enabled:
            return {}
        found = {m: f.without(frame.inputs.get(f"{m}_compression_mask")) for m, f in frame.features.items()}
        encoded = frame.inputs.get("mm_encoder_outputs") or {}
        for modality, names in _INPUTS.items():
            given = any(frame.inputs.get(name) is not None for name in names) or encoded.get(modality) is not None
            if modality in self.parts.ids and modality not in found and given:
                found[modality] = Features(modality, None)
        return found

    def _layout(self, frame: _Frame, features: Mapping[str, Features], states: Tensor, past: int) -> TokenLayout:
        width = states.shape[1]
        ids = frame.inputs.get("input_ids")
        if ids is None:
            ids = self._ids_from_embeddings(frame.inputs["inputs_embeds"])
        mask = frame.inputs.get("attention_mask")
        real = mask[:, -width:] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        ids = ids[:, -width:]
        # A generate() of its own expands its rows for beams behind our back.
        ids = ids.repeat_interleave(states.shape[0] // ids.shape[0], dim=0)
        real = None if real is None else real.repeat_interleave(ids.shape[0] // real.shape[0], dim=0)
        drafts = 0 if self._local.prompt is None else max(past + width - self._local.prompt, 0)
        types = frame.inputs.get("mm_token_type_ids")
        return find_layout(ids, real, features, self.parts.ids, self.parts.row.grouped, types, drafts)

    def _ids_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return ids that tell placeholders from text, by their embedding, as the library itself does."""
        table: Any = self.parts.base
        ids = torch.full(embeddings.shape[:2], -1, dtype=torch.long, device=embeddings.device)
        for token in set(self.parts.ids.values()):
            vector = table.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
            ids = torch.where((embeddings == vector).all(-1), token, ids)
        return ids

    def _leave_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        session = self._local.sessions.pop()
        if session is not None and session.cutting and output is not None:
            self._publish(session)

    # Decoder layers

    def _before_layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        session = self._session
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
        session = self._session
        if session is None or session.index is None:
            return None
        if isinstance(output, tuple):
            return (session.restore(output[0]), *output[1:])
        return unfold(session.restore(fold(output)), output)


def _prompt_length(given: Mapping[str, Any]) -> int | None:
    candidates = [given.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
    return next((int(given.shape[1]) for given in candidates if isinstance(given, Tensor) and given.ndim >= 2), None)


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
