"""The vectors by which parts compare tokens, by the words of a recipe."""

from __future__ import annotations

from typing import Literal

from mllm_squeeze.reducers.needs import EncoderProjection, EncoderStates, Features, Need, Normed, Projection

# features: states at the place of the cut. normed: those behind the final norm of the language model. keys, values,
# queries: of the block before the cut, heads side by side. next_keys: of the block behind it. encoder_keys: of the
# encoder's feature layer, mean over heads. encoder_states: its output. encoder_last_keys: of the encoder's last layer,
# heads side by side. encoder_first_states: the output of its first layer.
Vectors = Literal[
    "features",
    "normed",
    "keys",
    "values",
    "queries",
    "next_keys",
    "encoder_keys",
    "encoder_states",
    "encoder_last_keys",
    "encoder_first_states",
]


def need_of(by: Vectors) -> Need:
    """Return the signal that a word stands for."""
    needs: dict[Vectors, Need] = {
        "features": Features(),
        "normed": Normed(),
        "keys": Projection("key"),
        "values": Projection("value"),
        "queries": Projection("query"),
        "next_keys": Projection("key", block="next"),
        "encoder_keys": EncoderProjection(),
        "encoder_states": EncoderStates(),
        "encoder_first_states": EncoderStates(block=0),
        "encoder_last_keys": EncoderProjection(block=-1, heads="concat"),
    }
    return needs[by]
