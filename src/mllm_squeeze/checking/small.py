"""The parts of a small stand-in of a model's text model, the narrowest that runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mllm_squeeze.checking.prompt import trial_prompt
from mllm_squeeze.checking.stand_in import stand_in
from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream.names import USE_CACHE


@dataclass(frozen=True)
class Small:
    """A text model of the same class with random weights, as parts; None and `why_not` where none runs.

    shrunk: what was made smaller, in words.
    """

    parts: ModelParts | None
    shrunk: tuple[str, ...] = ()
    why_not: str = ""


def small_parts(parts: ModelParts) -> Small:
    """Return the narrowest stand-in that runs; some classes tie their width to other numbers. Never raises."""
    reasons = []
    for narrow, how in ((True, "narrow"), (False, "at full width")):
        try:
            small = stand_in(parts.decoder, narrow)
            found = _parts_of(parts, small.decoder)
            with torch.no_grad():
                small.decoder(**trial_prompt(found).given, **{USE_CACHE: False})
        # The code of any model runs here, and may raise anything; what it says is what there is to say.
        except Exception as error:
            reasons.append(f"{how}, {first_line(error)}")
            continue
        return Small(found, small.shrunk)
    return Small(None, why_not=f"no small text model of this config runs ({'; '.join(reasons)})")


def _parts_of(parts: ModelParts, decoder: nn.Module) -> ModelParts:
    layers: Any = decoder.layers
    nothing: dict[str, Any] = {"tower": None, "blocks": None, "projector": None}
    found = replace(parts, model=decoder, base=decoder, decoder=decoder, layers=layers, **nothing)
    # The inner model, which is not there any more, may be all that tells of positions with three axes.
    found.__dict__["position_axes"] = parts.position_axes
    return found


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, SqueezeError):
        return str(error)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
