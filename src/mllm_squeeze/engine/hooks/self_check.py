"""Proof that a cut of a model equals masking: on the first call of one that nobody has tried, and in `check`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_squeeze.amount import Amount
from mllm_squeeze.engine.hooks.current import Local
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.plan import Plan, PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_attention, is_causal
from mllm_squeeze.layout import Tile, TokenLayout
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Place
from mllm_squeeze.upstream import masks
from mllm_squeeze.upstream.attention import implementation, is_flash, using
from mllm_squeeze.upstream.calls import Arguments, LayerCall, TextCall
from mllm_squeeze.upstream.outputs import hidden_of
from mllm_squeeze.upstream.quantised import is_quantised

# Relative error that rounding alone explains, by the bytes of one number.
_TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 5e-2}
# Numbers of 8 bits and fewer are scaled by the largest beside them, and a cut takes some of those away.
_QUANTISED = 5e-2


class _EveryOther(Reducer):
    places: ClassVar[frozenset[Place]] = frozenset({"layer", "projector"})

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        return (current + 1) // 2

    def reduce(self, tokens: VisualTokens) -> Reduction:
        return Reduction(tokens.mask & (tokens.origin % 2 == 0))


@dataclass(frozen=True)
class Proof:
    """What one text model gave for one prompt, cut and masked: float32 (n, D) each, the states of all survivors."""

    short: Tensor
    masked: Tensor
    prefill: Prefill
    tolerance: float

    @property
    def error(self) -> float:
        """By how much they differ, relative to the largest state."""
        return distance(self.short, self.masked)

    @property
    def alike(self) -> bool:
        """True where rounding alone explains the difference; False where it is NaN."""
        return self.error <= self.tolerance

    def of(self, states: Tensor) -> Tensor:
        """Return the survivors' rows of states (B, T, D) of the same prompt."""
        return _survivors(self.prefill, states)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest of theirs."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


def probe_cut(layer: int) -> PlannedCut:
    """Return a cut that drops every other visual token at one layer."""
    return PlannedCut(0, "self-check", layer, _EveryOther(), Amount(ratio=0.5))


def prove(
    parts: ModelParts,
    local: Local,
    installer: Installer,
    layer: int,
    layout: TokenLayout,
    features: Mapping[str, Features],
    call: TextCall,
) -> Proof:
    """Run the text model with every other visual token cut at a layer, and with the same tokens masked.

    local: that of the hooks that are on the model from this layer on. installer: what collects them.

    Raises:
        UnsupportedModelError: a layer mixes tokens without attention, so masking them has no meaning.
    """
    _refuse_blind_layers(parts, layer)
    prefill = Prefill(Plan((probe_cut(layer),), repack=False), parts, layout, features, call.states.device)
    plain = call.without_cache()
    probe = local.probes.enter((prefill,), sys._getframe())
    try:
        with torch.no_grad():
            short = hidden_of(parts.decoder(**plain))
            probe.value = (None,)
            masked = _masked_run(parts, installer.nested(), prefill, layer, plain)
    finally:
        local.probes.leave(probe)
    exact = not is_quantised(parts.model)
    tolerance = _TOLERANCE.get(short.element_size(), _QUANTISED) if exact else _QUANTISED
    return Proof(_survivors(prefill, short), _survivors(prefill, masked), prefill, tolerance)


def require_alike(parts: ModelParts, proof: Proof) -> None:
    """Check that survivors come out alike.

    Raises:
        UnsupportedModelError: they do not, so this family needs more than its structure tells.
    """
    if not proof.alike:
        raise needs_handler(parts, f"a cut differs from masking the same tokens by {proof.error:.1e} (relative)")


def needs_handler(parts: ModelParts, why: str) -> UnsupportedModelError:
    """Return the error for a family that its structure alone does not serve."""
    return UnsupportedModelError(
        f"'{parts.row.model_type}' is not a known family. Its decoder was found at '{parts.path(parts.decoder)}' "
        f"with {len(parts.layers)} layers, but {why}. It needs a handler: see docs/add_a_family.md. The model was left "
        "as it was."
    )


def layers_without_attention(parts: ModelParts, layer: int) -> list[int]:
    """Return the layers from one on that mix tokens without attention, to which masking a token means nothing."""
    return [number for number in range(layer, len(parts.layers)) if not parts.has_entries(number)]


def _refuse_blind_layers(parts: ModelParts, layer: int) -> None:
    for number in layers_without_attention(parts, layer):
        raise UnsupportedModelError(
            f"Layer {number} of '{parts.row.model_type}' mixes tokens without attention, so a cut cannot be "
            "checked against masking. Add a row for the family: docs/add_a_family.md."
        )


def _masked_run(
    parts: ModelParts, installer: Installer, prefill: Prefill, layer: int, kwargs: dict[str, Any]
) -> Tensor:
    """Return the text model's output with the tokens that the prefill dropped masked, from one layer on."""
    kept = prefill.kept
    try:
        for number in range(layer, len(parts.layers)):
            installer.before(parts.layers[number], closing(kept, parts.layers[number]))
        with _masks_allowed(parts.text_config):
            return hidden_of(parts.decoder(**kwargs))
    finally:
        installer.remove()


def _masks_allowed(config: Any) -> AbstractContextManager[None]:
    """Compute attention by SDPA where FlashAttention is set, which takes no mask of queries by keys."""
    return using(config, "sdpa") if is_flash(implementation(config)) else nullcontext()


def _survivors(prefill: Prefill, states: Tensor) -> Tensor:
    return states[prefill.kept.to(states.device)].float()


def closing(kept: Tensor, layer: nn.Module) -> Any:
    """Return the pre-hook of a decoder layer that closes all tokens but the kept ones; kept: bool (B, T)."""
    causal = is_causal(find_attention(layer))

    def close(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        call = LayerCall.read(args, kwargs)
        hidden, mask = call.hidden, call.mask
        # Some layers pass several streams of states in front of the batch.
        length = hidden.shape[-2]
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device)[None, None]
            mask = mask.tril() if causal else mask
        open_ = kept.to(hidden.device)[:, None, None, :] | itself
        return call.replace(mask=masks.close(mask, ~open_)).out()

    return close
