"""Can the signals that a rule reads be had from a model, at the place where the rule acts."""

from __future__ import annotations

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_attention, find_pre_norm
from mllm_squeeze.planning.encoder_signals import check_encoder_need
from mllm_squeeze.reducers.needs import Attention, EncoderNeed, Features, Normed, Projection, Size

# What a rule can read in front of the blocks of the vision encoder.
INSIDE = (Features(), Projection(heads="mean"), Size())


def check_needs(method: str, cut: PlannedCut, parts: ModelParts) -> None:
    """Check that a model gives what a cut reads.

    Raises:
        ConfigError: the layer has no layer before it to read.
        UnsupportedModelError: the model lacks a part that gives a signal; the message names it.
    """
    for need in cut.reducer.needs():
        if isinstance(need, (Attention, Projection)):
            _check_attention(method, cut, need, parts)
        elif isinstance(need, EncoderNeed):
            check_encoder_need(method, need, parts)
        elif isinstance(need, Normed) and (parts.final_norm is None or parts.row.stacked):
            raise UnsupportedModelError(
                f"'{method}' reads normed states; no final norm was found in this model. Use a method that reads none.",
                avoid=[],
            )


def check_inside(method: str, step: PlannedCut) -> None:
    """Check that a reducer can work in front of encoder blocks, where all tiles run as one tensor.

    Raises:
        UnsupportedModelError: it reads what is not known there, or its count follows from the picture.
    """
    facts = step.reducer.facts
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


def _check_attention(method: str, cut: PlannedCut, need: Attention | Projection, parts: ModelParts) -> None:
    if need.block == "next":
        layer = parts.layers[cut.layer]
        if parts.row.stacked or find_attention(layer) is None or find_pre_norm(layer) is None:
            raise UnsupportedModelError(
                f"'{method}' previews layer {cut.layer}, whose attention or norm was not found; read the layer before "
                "the cut: block: -1."
            )
        return
    if cut.layer == 0:
        raise ConfigError(
            f"'{method}' reads the attention of the layer before the cut, so layer must be between 1 and "
            f"{len(parts.layers) - 1}; got 0. Before the LLM, use a method that reads nothing of it.",
            avoid=["attention of the LLM"],
        )
    if find_attention(parts.layers[cut.layer - 1]) is None:
        raise UnsupportedModelError(
            f"'{method}' reads the attention of layer {cut.layer - 1}, which has none. Choose another layer, "
            "or a method that reads none.",
            avoid=["attention of the LLM"],
        )
