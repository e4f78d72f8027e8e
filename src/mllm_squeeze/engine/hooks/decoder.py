"""Hooks on the text model: each call of it whose layers need something of us is a pass of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.decode.static_step import is_static_step, is_traced_step
from mllm_squeeze.engine.hooks import self_check
from mllm_squeeze.engine.hooks.current import Local, PromptRun
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks, Publish
from mllm_squeeze.engine.hooks.requests import Requests
from mllm_squeeze.engine.hooks.untraced import untraced
from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.passes import Pass
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.engine.tokens.prompt import features_of, layout_of, prompt_ids, warn_no_image
from mllm_squeeze.errors import SqueezeError, UnsupportedInputError
from mllm_squeeze.family.handlers.deepstack import follow_cuts, has_deepstack
from mllm_squeeze.family.handlers.inner_features import take_inner_features
from mllm_squeeze.family.handlers.temperature import refuse_scaled
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.upstream.attention import implementation
from mllm_squeeze.upstream.calls import TextCall
from mllm_squeeze.upstream.names import POSITIONS
from mllm_squeeze.upstream.outputs import with_layer_states
from mllm_squeeze.upstream.versions import installed


class DecoderHooks(Hooks):
    """Starts a pass when the text model is called, and hands a prefill on when its call ends."""

    def __init__(self, parts: ModelParts, plan: Plan, local: Local, requests: Requests, publish: Publish) -> None:
        super().__init__(parts, plan, local, requests, publish)
        self._verified = parts.row.verified
        self._windowed = any(parts.window(number) for number in range(len(parts.layers)))

    def attach(self, installer: Installer) -> None:
        """Put the hooks on."""
        self._installer = installer
        installer.around(self.parts.decoder, self._enter, self._leave)
        if has_deepstack(self.parts.decoder):
            installer.add(follow_cuts(self.parts.decoder, self._kept_now))

    def _kept_now(self) -> tuple[Tensor, Tensor | None] | None:
        left = None if self._local.running is None else self._local.running.left
        return None if left is None else (left.index, left.valid)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_traced_step(kwargs):
            return None
        call = TextCall.read(module, args, kwargs)
        live = dict(call.named)
        entry = self._local.passes.enter(None)
        probe = self._local.probe
        entry.value = running = probe[0] if probe is not None else self._start(call, live)
        if isinstance(running, Prefill):
            given, running.inner = take_inner_features(live)
            live.update(given)
        return (), live

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if is_traced_step(kwargs):
            return None
        ended = self._local.passes.leave()
        # A self-check is not what the user ran.
        if not isinstance(ended, Prefill) or output is None or self._local.probe is not None:
            return None
        whole = with_layer_states(output, ended.restore_earlier) if self.parts.read_on else None
        self._publish(ended)
        return whole

    @untraced
    def _start(self, call: TextCall, live: dict[str, Any]) -> Pass | None:
        """Return the pass of a call, None where its layers need nothing of us.

        live: arguments of the text model that go on to it; positions of a decode step may change in them.
        """
        if is_static_step(call.named):
            return None
        past = kv.tokens_seen(call.cache)
        run, features = self._prompted(call, past)
        if not features and not kv.is_cut(call.cache):
            if self._enabled() and call.width > 1 and not past:
                self._publish(None)
                warn_no_image()
            return None
        if run is not None and features:
            prefill = self._prefill(call, run, features, past)
            if prefill is not None:
                return prefill
        # Some families are given their pictures again in later passes, which hold no placeholder.
        if not kv.is_cut(call.cache) or self._is_plain_step(call, live):
            return None
        refuse_scaled(self.parts.text_config, past + call.width)
        return Pass(self.plan, self.parts, call.width, past)

    def _prompted(self, call: TextCall, past: int) -> tuple[PromptRun | None, dict[str, Features]]:
        """Return the call of the inner model, and what was encoded for this pass, which may be a decode step."""
        run = self._local.prompt_run
        # Where generate() itself is the run, its later passes are decode steps.
        decodes = (self.parts.row.own_generate and past) or call.width == 1
        if run is None or decodes or not self._enabled():
            return run, {}
        return run, features_of(run.call, run.features, self.parts.ids)

    def _prefill(self, call: TextCall, run: PromptRun, features: Mapping[str, Features], past: int) -> Prefill | None:
        """Return the pass over a prompt, None where no visual token stands in it."""
        _refuse_packed(call)
        _refuse_recomputed(self.parts)
        layout = layout_of(run.call, features, self.parts, call, past, self._local.prompt)
        if not layout.spans:
            return None
        refuse_scaled(self.parts.text_config, past + call.width)
        prefill = Prefill(
            self._requests.planned(),
            self.parts,
            layout,
            features,
            call.states.device,
            past=past,
            rows=self._local.rows,
            wanted=self._local.wanted,
        )
        if self.plan.text_encoder is not None:
            prefill.ids = prompt_ids(run.call, layout)
        self._check(layout, features, call)
        return prefill

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
            proof = self_check.prove(self.parts, self._local, self._installer, layer, layout, features, call)
        except SqueezeError:
            raise
        # The code of a model that nobody has tried may raise anything when it is cut.
        except Exception as error:
            raise self_check.needs_handler(
                self.parts, f"a cut, or its mask, raises {type(error).__name__}: {error}"
            ) from error
        self_check.require_alike(self.parts, proof)
        self._verified = True


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
