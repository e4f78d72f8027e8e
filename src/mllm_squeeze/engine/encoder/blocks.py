"""Which block of the vision encoder a rule means."""

from __future__ import annotations

from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.reducers.needs import Embedding, EncoderAttention, EncoderBlock, EncoderStates, Need, Sensitivity


def wanted_block(need: Need) -> EncoderBlock:
    """Return the block as a need names it."""
    block: EncoderBlock = getattr(need, "block", "feature")
    return block


def is_of_states(need: Need) -> bool:
    """True for what is read of the states that a block gives, not of its attention."""
    return isinstance(need, (EncoderStates, Embedding)) or (isinstance(need, EncoderAttention) and need.rows == "probe")


def block_of(need: Need, parts: ModelParts) -> int | None:
    """Return the number of the block that a need means, None where it means none or the encoder has no such block.

    Of states, the feature block is the one whose output the LLM gets. Of attention it is that one where the encoder has
    a CLS token; else the last that sees the whole picture, or the second to last: the last looks where no output is
    made any more.
    """
    if parts.blocks is None or isinstance(need, Sensitivity):
        return None
    block, count = wanted_block(need), len(parts.blocks)
    if block == "feature":
        return parts.feature_block if is_of_states(need) else parts.saliency_block
    if isinstance(block, float):
        return int(block * count) if 0 < block < 1 else None
    number = block + count if block < 0 else block
    return number if 0 <= number < count else None
