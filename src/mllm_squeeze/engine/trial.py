"""Tries on a prompt of its own whether a cut of a model equals masking: what `check` runs."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm_squeeze.engine import selfcheck
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.runtime import Runtime
from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.family.handlers.deepstack import has_deepstack
from mllm_squeeze.family.handlers.inner_features import has_inner_features
from mllm_squeeze.family.standin import VOCABULARY, stand_in
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import Span, Tile, TokenLayout
from mllm_squeeze.upstream.calls import EMBEDDINGS, POSITIONS, USE_CACHE, TextCall
from mllm_squeeze.upstream.outputs import hidden_of

# The prompt: text, a picture of SIDE x SIDE tokens, text.
_BEFORE, _SIDE, _AFTER = 4, 4, 8
_LENGTH = _BEFORE + _SIDE**2 + _AFTER
# Masking must change this many times more than the cut and the mask differ, or their equality says nothing.
_MATTERS = 3

Result = Literal["passed", "failed", "not comparable", "not run"]


@dataclass(frozen=True)
class Trial:
    """What the self-check of a model said.

    layer: where it cut. error: how much the cut differs from masking the same tokens, relative to the largest state.
    effect: by how much masking changes anything. on: what ran, None where nothing did. reason: why it is not "passed".
    """

    result: Result
    on: str | None
    layer: int | None = None
    error: float | None = None
    effect: float | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, and all of it in words as `text`."""
        return {**asdict(self), "text": str(self)}

    def __str__(self) -> str:
        if self.reason is not None:
            help_ = "; it needs a handler, see docs/add_a_family.md" if self.result == "failed" else ""
            return f"{self.result}: {self.reason}{help_}"
        return (
            f"{self.result}: a cut at layer {self.layer} equals masking, error {self.error:.0e} (masking changes "
            f"{self.effect:.0e})"
        )


def try_cut(parts: ModelParts) -> Trial:
    """Cut every other visual token of a prompt, mask the same ones, and compare what is left.

    A model without weights (meta device) is tried by a small random stand-in of its text model. Never raises for what a
    model does.
    """
    if parts.cross_attention:
        reason = "pictures are no part of the text model's sequence; the text attends to them in cross-attention layers"
        return Trial("not comparable", None, reason=reason)
    layer = _layer(parts)
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
    return _tried_small(parts)


def _is_empty(decoder: nn.Module) -> bool:
    return all(weight.is_meta for weight in decoder.parameters())


def _layer(parts: ModelParts) -> int:
    """Return the layer to cut at: 1, so that one layer sees all, unless the model is too short for that."""
    return min(1, len(parts.layers) - 1, *parts.kv_sources.values())


def _tried_small(parts: ModelParts) -> Trial:
    """Try the narrowest stand-in that runs; some classes tie their width to other numbers."""
    reasons = []
    for narrow, how in ((True, "narrow"), (False, "at full width")):
        try:
            small = stand_in(parts.decoder, narrow)
            found = _parts_of(parts, small.decoder)
            _last_hidden(found, _prompt(found))
        # The code of any model runs here, and may raise anything; what it says is what there is to say.
        except Exception as error:
            reasons.append(f"{how}, {_first_line(error)}")
            continue
        return _tried(found, ", ".join(("its text model alone, random weights, float32", *small.shrunk)))
    return Trial("not run", None, reason=f"no small text model of this config runs ({'; '.join(reasons)})")


def _parts_of(parts: ModelParts, decoder: nn.Module) -> ModelParts:
    layers: Any = decoder.layers
    nothing: dict[str, Any] = {"tower": None, "blocks": None, "projector": None}
    return replace(parts, model=decoder, base=decoder, decoder=decoder, layers=layers, **nothing)


def _tried(parts: ModelParts, on: str) -> Trial:
    layer = _layer(parts)
    try:
        given = _prompt(parts)
        dense = _last_hidden(parts, given)
    except Exception as error:
        return Trial("not run", on, layer, reason=f"the text model alone does not run: {_first_line(error)}")
    runtime = Runtime(parts, Plan((selfcheck.probe_cut(layer),), repack=False), lambda session: None)
    try:
        runtime.attach()
        proof = runtime.prove(layer, _layout(), {}, TextCall.read(parts.decoder, (), given))
    except SqueezeError as error:
        return Trial("not run", on, layer, reason=str(error))
    except Exception as error:
        return Trial("failed", on, layer, reason=f"a cut at layer {layer} raises: {_first_line(error)}")
    finally:
        runtime.detach()
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


# The prompt


def _layout() -> TokenLayout:
    span = Span(0, "image", 0, ((_BEFORE, _SIDE**2),), (Tile(1, _SIDE, _SIDE),))
    return TokenLayout(1, _LENGTH, (span,), torch.ones(1, _LENGTH, dtype=torch.bool))


def _prompt(parts: ModelParts) -> dict[str, Any]:
    """Return arguments of the text model: embeddings of random words, and what else its picture brings with it."""
    decoder: Any = parts.decoder
    generator = torch.Generator().manual_seed(0)
    device = next(decoder.embed_tokens.parameters()).device
    config = parts.text_config
    # Gemma 3n has a second table, for fewer words; some releases of transformers look up the others in it as well.
    second = getattr(config, "vocab_size_per_layer_input", None) or VOCABULARY
    words = min(int(config.vocab_size), int(second), VOCABULARY)
    ids = torch.randint(words, (1, _LENGTH), generator=generator).to(device)
    visual = _layout().visual.to(device)
    with torch.no_grad():
        states = decoder.embed_tokens(ids)
    given: dict[str, Any] = {EMBEDDINGS: states}
    features = [states[0, -(_SIDE**2) :].flip(0), states[0, : _SIDE**2].flip(0)]
    if parts.mrope:
        given[POSITIONS] = _grid_positions().to(device)
    if has_deepstack(decoder):
        given.update(visual_pos_masks=visual, deepstack_visual_embeds=features)
    if has_inner_features(decoder):
        # The first behind the cut, where the engine has to shorten it.
        inner = min(_layer(parts) + 1, len(parts.layers) - 1)
        given.update(vision_mask=visual[..., None], deepstack_features={0: features[0], inner: features[1]})
    own = getattr(parts.text_config, "hidden_size_per_layer_input", None)
    if own and "per_layer_inputs" in inspect.signature(decoder.forward).parameters:
        look_up = decoder.get_per_layer_inputs
        # Gemma 4 takes the embeddings as well; some releases of transformers insist on them.
        more = (states,) if EMBEDDINGS in inspect.signature(look_up).parameters else ()
        with torch.no_grad():
            given["per_layer_inputs"] = look_up(ids, *more)
    return given


def _grid_positions() -> Tensor:
    """Return positions (3, 1, T) on three axes, as M-RoPE gives them to a picture."""
    cells = torch.tensor(Tile(1, _SIDE, _SIDE).coordinates()).T + _BEFORE
    before, after = torch.arange(_BEFORE).expand(3, -1), torch.arange(_AFTER).expand(3, -1) + _BEFORE + _SIDE
    return torch.cat([before, cells, after], dim=1)[:, None]


def _last_hidden(parts: ModelParts, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return hidden_of(parts.decoder(**given, **{USE_CACHE: False}))


def _first_line(error: Exception) -> str:
    if isinstance(error, SqueezeError):
        return str(error)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
