"""Can what a rule reads in the audio encoder be had from a model."""

from __future__ import annotations

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.reducers.needs import SoundAttention
from mllm_squeeze.upstream.attention import computes_by_itself
from mllm_squeeze.upstream.modules import is_packed


def check_sound_need(method: str, need: SoundAttention, parts: ModelParts) -> None:
    """Check that a model gives a signal of its audio encoder.

    Raises:
        UnsupportedModelError: it does not; the message says why.
    """
    reason = _why_not(parts)
    if reason is not None:
        raise UnsupportedModelError(
            f"'{method}' reads {need.phrase} ({need}), which '{parts.row.model_type}' does not give: {reason}. Use a "
            "method that reads nothing of the audio encoder.",
            avoid=["encoder attention"],
        )


def _why_not(parts: ModelParts) -> str | None:
    if "audio" not in parts.ids or parts.sound_tower is None:
        return "its audio encoder was not found"
    if not hasattr(parts.base, "get_audio_features"):
        return "its sound is not encoded by a method of the model, get_audio_features"
    block = parts.sound_block
    attention = None if block is None else find_attention(block)
    if attention is None:
        return "the last block of its audio encoder has no attention that is known"
    if not is_packed(attention):
        return "its audio encoder pads recordings to one length, and which of its tokens are padding is not known"
    if computes_by_itself(attention):
        return f"{type(attention).__name__} of its audio encoder does not say through transformers what it attends to"
    return None
