"""What a rule may read: one frozen type per kind of signal. The need itself is the key under which its signal arrives.

S is spans, N visual tokens of the longest span, T words of the longest prompt behind its first visual token, M tokens
of all kinds that were there when it was read (`VisualTokens.among` says which of them are the visual ones), H heads, d
channels of a head, D channels of a state. All is computed from queries, keys and states in blocks: no attention map is
kept, and every attention implementation gives the same.
"""

from __future__ import annotations

from .base import EVERYWHERE, Block, EncoderBlock, Heads, HeadsOfStates, Need, Place, Side, Whose
from .encoders import EncoderAttention, EncoderNeed, EncoderProjection, EncoderStates, Sensitivity, SoundAttention
from .language_model import Attention, Features, Normed, Projection, Rotary, States
from .prompt import Embedding, Runs, Size

__all__ = [
    "EVERYWHERE",
    "Attention",
    "Block",
    "Embedding",
    "EncoderAttention",
    "EncoderBlock",
    "EncoderNeed",
    "EncoderProjection",
    "EncoderStates",
    "Features",
    "Heads",
    "HeadsOfStates",
    "Need",
    "Normed",
    "Place",
    "Projection",
    "Rotary",
    "Runs",
    "Sensitivity",
    "Side",
    "Size",
    "SoundAttention",
    "States",
    "Whose",
]
