"""Can a signal be read inside the language model, at the block that a rule names."""

from __future__ import annotations

from torch import nn

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.signals.source import layer_of
from mllm_squeeze.engine.signals.states import module_of
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_attention, find_pre_norm
from mllm_squeeze.planning.shared_space import check_embedding
from mllm_squeeze.reducers.needs import Attention, Embedding, Need, Projection, Rotary, States
from mllm_squeeze.upstream.block_parts import projected_of, strange_parts
from mllm_squeeze.upstream.rope import head_width, leaves_unturned


def check_text_model(method: str, cut: PlannedCut, need: Need, parts: ModelParts) -> None:
    """Check that a layer of the language model gives a signal to a cut.

    Raises:
        ConfigError: a block is out of range or behind the cut, or the parts of a need do not go together.
        UnsupportedModelError: the model lacks a part that gives the signal; the message names it.
    """
    if isinstance(need, Embedding):
        check_embedding(method, cut, need, parts)
    if not isinstance(need, (Attention, Projection, Rotary, States)):
        return
    if isinstance(need, Attention) and need.rows == "all" and need.over_rows == "each":
        raise ConfigError(
            f"'{method}' reads {need}: all rows cannot each be told apart. Join them (mean, sum, max), or name the "
            "rows: visual, text, last, chosen."
        )
    if need.block == "next":
        _check_next(method, cut, parts)
    else:
        _check_block(method, cut, need, parts)
    layer = layer_of(cut, need)
    if isinstance(need, States):
        _check_states(method, need, layer, parts)
        return
    attention = find_attention(parts.layers[layer])
    if attention is None:
        raise UnsupportedModelError(
            f"'{method}' reads the attention of layer {layer}, which has none. Choose another layer, or a method that "
            "reads none.",
            avoid=["attention of the LLM"],
        )
    if isinstance(need, Projection) and not need.rope:
        _check_projection(method, need, layer, parts)
    if isinstance(need, Rotary):
        _check_rotary(method, layer, attention, parts)


def _check_next(method: str, cut: PlannedCut, parts: ModelParts) -> None:
    layer = parts.layers[cut.layer]
    if parts.row.stacked or find_attention(layer) is None or find_pre_norm(layer) is None:
        raise UnsupportedModelError(
            f"'{method}' previews layer {cut.layer}, whose attention or norm was not found; read the layer before "
            "the cut: block: -1."
        )


def _check_block(
    method: str, cut: PlannedCut, need: Attention | Projection | Rotary | States, parts: ModelParts
) -> None:
    """Check that a block lies in front of the cut: it must have run when the rule chooses."""
    layer = layer_of(cut, need)
    if cut.layer == 0:
        raise ConfigError(
            f"'{method}' reads {need.phrase} in front of the cut, so layer must be between 1 and "
            f"{len(parts.layers) - 1}; got 0. Before the LLM, use a method that reads nothing of it.",
            avoid=["attention of the LLM"],
        )
    if not 0 <= layer < cut.layer:
        raise ConfigError(
            f"'{method}' reads {need} for a cut at layer {cut.layer}, which is layer {layer}. The layers in front of "
            f"this cut are 0 to {cut.layer - 1}: give one of them, or count back from the cut, -1 to {-cut.layer}."
        )


def _check_states(method: str, need: States, layer: int, parts: ModelParts) -> None:
    if parts.row.stacked:
        raise UnsupportedModelError(
            f"'{method}' reads {need.phrase}, and the layers of '{parts.row.model_type}' pass several streams of "
            "states. Read features instead."
        )
    if need.where == "in":
        return
    if module_of(need.where, parts.layers[layer]) is None:
        there = ", ".join(name for name, _ in parts.layers[layer].named_children())
        raise UnsupportedModelError(
            f"'{method}' reads '{need.where}' of layer {layer}, and no module was found there that gets or gives it: "
            f"the layer has {there}. Read other states (in, attention_in, mlp_in), or choose another layer."
        )
    strange = strange_parts(parts.layers[layer]) if need.where.endswith("_out") else []
    if strange:
        raise UnsupportedModelError(
            f"'{method}' reads '{need.where}' of layer {layer}, whose parts {', '.join(strange)} may change what is "
            "added to the stream. Read other states (in, attention_in, mlp_in)."
        )


def _check_projection(method: str, need: Projection, layer: int, parts: ModelParts) -> None:
    attention = find_attention(parts.layers[layer])
    assert attention is not None
    borrowed = layer in parts.kv_sources and need.what != "query"
    found = f"it borrows them from layer {parts.kv_sources[layer]}" if borrowed else projected_of(attention, need.what)
    if isinstance(found, str):
        raise UnsupportedModelError(
            f"'{method}' reads the {need.what} of layer {layer} in front of the rotary embedding, and "
            f"{type(attention).__name__} does not give it by itself: {found}. Read it behind: rope: true."
        )


def _check_rotary(method: str, layer: int, attention: nn.Module, parts: ModelParts) -> None:
    """Check that a layer turns queries and keys by tables, on one axis of positions or on three."""
    reasons = [
        (parts.rotary is None, "its text model has no rotary embedding: positions are learned, or turned elsewhere"),
        (leaves_unturned(attention), f"layer {layer} does not turn queries and keys"),
        (head_width(attention) is None, f"{type(attention).__name__} does not say how wide its heads are"),
    ]
    for bad, reason in reasons:
        if bad:
            raise UnsupportedModelError(
                f"'{method}' reads the rotary angles of layer {layer}, which '{parts.row.model_type}' does not have: "
                f"{reason}. Choose another layer, or read attention alone: score: attention.",
                avoid=["rotary angles"],
            )
