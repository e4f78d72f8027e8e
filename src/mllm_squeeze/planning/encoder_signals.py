"""Can what a rule reads in the vision encoder be had from a model, and be carried to the tokens that the LLM gets."""

from __future__ import annotations

from mllm_squeeze.engine.encoder.blocks import block_of, is_of_states, wanted_block
from mllm_squeeze.engine.encoder.pushed import maps_token_by_token
from mllm_squeeze.engine.text_encoder import PromptEncoder
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.family.tower_to_llm import why_not
from mllm_squeeze.reducers.needs import Embedding, EncoderAttention, EncoderNeed, EncoderStates, Sensitivity
from mllm_squeeze.upstream.attention import computes_by_itself


def check_encoder_need(
    method: str, need: EncoderNeed | Embedding, parts: ModelParts, encoder: PromptEncoder | None = None
) -> None:
    """Check that a model gives an encoder signal.

    encoder: whose pooling head stands in where the tower has none.

    Raises:
        ConfigError: the encoder has no block of that number.
        UnsupportedModelError: the encoder does not give it, or it cannot be carried; the message says why.
    """
    pushed = isinstance(need, Sensitivity)
    reason = why_not(parts) or (_no_pushes(parts) if pushed else _no_blocks(parts))
    if reason is None and not pushed:
        _check_block(method, need, parts)
        reason = _unreadable(need, parts, encoder)
    if reason is not None:
        raise UnsupportedModelError(
            f"'{method}' reads {need.phrase} ({need}), which '{parts.row.model_type}' does not give: {reason}. Use a "
            "method that reads nothing of the vision encoder.",
            avoid=["encoder attention"],
        )


def _no_blocks(parts: ModelParts) -> str | None:
    if parts.tower is None:
        return "its vision encoder was not found"
    if parts.blocks is None:
        return f"its vision encoder ({type(parts.tower).__name__}) has no list of attention blocks that is known"
    return None


def _no_pushes(parts: ModelParts) -> str | None:
    if parts.projector is None:
        return "its projector was not found"
    if not maps_token_by_token(parts):
        return "its projector joins tokens in a way that is not known, so its answer is that of no single token"
    return None


def _check_block(method: str, need: EncoderNeed | Embedding, parts: ModelParts) -> None:
    if block_of(need, parts) is None and parts.blocks is not None:
        count = len(parts.blocks)
        raise ConfigError(
            f"'{method}' reads block {wanted_block(need)} of the vision encoder of '{parts.row.model_type}', which has "
            f"{count} blocks. Give a number from 0 to {count - 1}, -1 to -{count} from the last, a fraction "
            "between 0 and 1 of the depth, or 'feature'."
        )


def _unreadable(need: EncoderNeed | Embedding, parts: ModelParts, encoder: PromptEncoder | None) -> str | None:
    """Return why a block does not give a signal, None where it does."""
    of_cls = getattr(need, "cls", False) or (isinstance(need, EncoderAttention) and need.rows == "cls")
    if of_cls and not parts.has_cls:
        return "its vision encoder has no CLS token"
    lent = None if encoder is None else encoder.pooling_model
    if isinstance(need, EncoderAttention) and is_of_states(need) and parts.probe_head is None and lent is None:
        return (
            "its vision encoder has no head that pools patches by the attention of a learned query, nor has a text "
            "encoder that is given"
        )
    if isinstance(need, (EncoderStates, Embedding)) or parts.blocks is None:
        return None
    number = block_of(need, parts)
    attention = None if number is None else find_attention(parts.blocks[number])
    if attention is None:
        return f"block {number} of its vision encoder has no attention that is known"
    if computes_by_itself(attention):
        return f"{type(attention).__name__} of its vision encoder does not say through transformers what it attends to"
    return None
