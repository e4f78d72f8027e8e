"""Can the signals that a rule reads be had from a model, at the place where the rule acts."""

from __future__ import annotations

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.planning.encoder_signals import check_encoder_need
from mllm_squeeze.planning.sound_signals import check_sound_need
from mllm_squeeze.planning.text_model import check_text_model
from mllm_squeeze.reducers.needs import EncoderNeed, Features, Normed, Projection, Size, SoundAttention

# What a rule can read in front of the blocks of the vision encoder.
INSIDE = (Features(), Projection(heads="mean"), Size())


def check_needs(method: str, cut: PlannedCut, parts: ModelParts) -> None:
    """Check that a model gives what a cut reads.

    Raises:
        ConfigError: a block is out of range or behind the cut, or the parts of a need do not go together.
        UnsupportedModelError: the model lacks a part that gives a signal; the message names it.
    """
    for need in cut.reducer.needs():
        if isinstance(need, EncoderNeed):
            check_encoder_need(method, need, parts, cut.text_encoder)
        elif isinstance(need, SoundAttention):
            check_sound_need(method, need, parts)
        elif isinstance(need, Normed) and (parts.final_norm is None or parts.row.stacked):
            raise UnsupportedModelError(
                f"'{method}' reads normed states; no final norm was found in this model. Use a method that reads none.",
                avoid=[],
            )
        else:
            check_text_model(method, cut, need, parts)


def check_inside(method: str, step: PlannedCut) -> None:
    """Check that a reducer can work in front of encoder blocks, where all tiles run as one tensor.

    Raises:
        UnsupportedModelError: it reads what is not known there, or its count follows from the picture.
    """
    facts = step.facts
    others = [need for need in step.reducer.needs() if need not in INSIDE]
    if others:
        raise UnsupportedModelError(
            f"'{method}' reads {', '.join(str(need) for need in others)} inside the vision encoder, where a rule can "
            f"read {', '.join(str(need) for need in INSIDE)}. Let it act at the projector or in the LLM."
        )
    if step.decides or not facts.known_count:
        raise UnsupportedModelError(
            f"'{method}' leaves a number of tokens inside the vision encoder that follows from the picture, and "
            "all tiles must keep the same number there. Use a reducer whose count is known, or act at the projector."
        )
