"""Tries on a prompt of its own whether a cut of a model equals masking: what `check` runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm_squeeze.checking.canary import decoding_of, in_words
from mllm_squeeze.checking.prompt import layer_to_cut, trial_prompt
from mllm_squeeze.checking.small import first_line, small_parts
from mllm_squeeze.engine.hooks import self_check as selfcheck
from mllm_squeeze.engine.hooks.attachment import Attachment
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream.calls import TextCall
from mllm_squeeze.upstream.names import USE_CACHE
from mllm_squeeze.upstream.outputs import hidden_of

# Masking must change this many times more than the cut and the mask differ, or their equality says nothing.
_MATTERS = 3

Result = Literal["passed", "failed", "not comparable", "not run"]


@dataclass(frozen=True)
class Trial:
    """What the self-check of a model said.

    layer: where it cut. error: how much the cut differs from masking the same tokens, relative to the largest state.
    effect: by how much masking changes anything. on: what ran, None where nothing did. reason: why it is not "passed".
    decoding: what a small text model of the class said of decode steps, caches and padded batches: "exact", "failed",
    or why they were not tried.
    """

    result: Result
    on: str | None
    layer: int | None = None
    error: float | None = None
    effect: float | None = None
    reason: str | None = None
    decoding: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, and all of it in words as `text`."""
        return {**asdict(self), "text": str(self)}

    def __str__(self) -> str:
        if self.reason is not None:
            help_ = "; it needs a handler, see docs/add_a_family.md" if self.result == "failed" else ""
            return f"{self.result}: {self.reason}{help_}"
        return (
            f"{self.result}: a cut at layer {self.layer} equals masking, error {self.error:.0e} (masking changes "
            f"{self.effect:.0e}); decoding: {self.decoding}"
        )


def try_cut(parts: ModelParts) -> Trial:
    """Cut every other visual token of a prompt, mask the same ones, and compare what is left.

    A model without weights (meta device) is tried by a small random stand-in of its text model. Never raises for what a
    model does.
    """
    if parts.cross_attention:
        reason = "pictures are no part of the text model's sequence; the text attends to them in cross-attention layers"
        return Trial("not comparable", None, reason=reason)
    verdict = decoding_of(parts)
    found = _compared(parts)
    if verdict.broken:
        reason = f"cuts of a small text model are not exact: {in_words(verdict.broken)}"
        return replace(found, result="failed", reason=reason, decoding="failed")
    return replace(found, decoding="exact" if verdict.ran else f"not tried: {verdict.why_not}")


def _compared(parts: ModelParts) -> Trial:
    layer = layer_to_cut(parts)
    blind = selfcheck.layers_without_attention(parts, layer)
    if blind:
        reason = (
            f"layers without attention ({len(blind)} of the {len(parts.layers) - layer} from layer {layer} on), to "
            "which masking a token means nothing"
        )
        return Trial("not comparable", None, reason=reason)
    if not _is_empty(parts.decoder):
        if parts.decoder.training:
            return Trial("not run", None, reason="the model is in training mode; call model.eval() first")
        dtype = str(next(parts.decoder.parameters()).dtype).removeprefix("torch.")
        return _tried(parts, f"the model itself, {dtype}")
    small = small_parts(parts)
    if small.parts is None:
        return Trial("not run", None, reason=small.why_not)
    return _tried(small.parts, ", ".join(("its text model alone, random weights, float32", *small.shrunk)))


def _is_empty(decoder: nn.Module) -> bool:
    return all(weight.is_meta for weight in decoder.parameters())


def _tried(parts: ModelParts, on: str) -> Trial:
    layer = layer_to_cut(parts)
    try:
        prompt = trial_prompt(parts)
        dense = _last_hidden(parts, prompt.given)
    except Exception as error:
        return Trial("not run", on, layer, reason=f"the text model alone does not run: {first_line(error)}")
    attachment = Attachment(parts, Plan((selfcheck.probe_cut(layer),), repack=False), lambda prefill: None)
    try:
        attachment.attach()
        proof = attachment.prove(layer, prompt.layout(), {}, TextCall.read(parts.decoder, (), prompt.given))
    except SqueezeError as error:
        return Trial("not run", on, layer, reason=str(error))
    except Exception as error:
        return Trial("failed", on, layer, reason=f"a cut at layer {layer} raises: {first_line(error)}")
    finally:
        attachment.detach()
    return _judged(proof, selfcheck.distance(proof.of(dense), proof.masked), layer, on)


def _judged(proof: selfcheck.Proof, effect: float, layer: int, on: str) -> Trial:
    error = proof.error
    if not math.isfinite(error):
        return Trial("failed", on, layer, reason=f"a cut at layer {layer}, or masking the same tokens, gives {error}")
    if not proof.alike:
        reason = f"a cut at layer {layer} differs from masking the same tokens by {error:.1e} (relative)"
        return Trial("failed", on, layer, error, effect, reason)
    if not effect > _MATTERS * error:
        reason = f"masking the tokens changes {effect:.0e}, the cut differs from it by {error:.0e}: too close to tell"
        return Trial("not comparable", on, layer, error, effect, reason)
    return Trial("passed", on, layer, error, effect)


def _last_hidden(parts: ModelParts, given: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return hidden_of(parts.decoder(**given, **{USE_CACHE: False}))
