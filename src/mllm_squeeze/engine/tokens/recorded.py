"""What was recorded about a feature method's output, carried by the output itself until the prompt is read."""

from __future__ import annotations

from typing import Any

from mllm_squeeze.amount import Amount
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.text_encoder import SharedSpace
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.reducers.base import Reducer

# Attribute under which a feature method's output carries what was recorded about it.
MARK = "mllm_squeeze_features"


def recorded(plan: Plan, output: Any) -> Features | None:
    """Return what was recorded about a feature method's output, None where nothing was.

    Raises:
        UnsupportedInputError: it was encoded under a method that asked the encoder for something else.
    """
    found: Features | None = getattr(output, MARK, None)
    if found is None:
        return None
    lacking = [need for need in plan.encoder_needs if need not in found.signals]
    other = found.merged_by != merger(plan) or found.compared_by is not comparer(plan)
    if (lacking and found.lengths is not None) or other:
        raise UnsupportedInputError(
            f"The {found.modality} features of this call were encoded while another method was applied, which asked "
            "the encoder for something else. Encode the pictures anew after squeeze.apply."
        )
    return found


def merger(plan: Plan) -> tuple[Reducer, Amount] | None:
    """Return what works inside the encoder under a plan and how much it leaves, None where nothing does."""
    return None if plan.encoder is None else (plan.encoder.reducer, plan.encoder.amount)


def comparer(plan: Plan) -> SharedSpace | None:
    """Return the space into which patches are projected under a plan, None where none is given."""
    return None if plan.text_encoder is None else plan.text_encoder.space


def mark(output: Any, found: Features) -> None:
    """Let a feature method's output carry what was recorded about it."""
    setattr(output, MARK, found)
