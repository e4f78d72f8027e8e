"""Model types of transformers that cannot be squeezed, by what is so about them, and not because nobody has looked."""

from __future__ import annotations

_BOTH_AT_ONCE = (
    "each position of its prompt is the sum of a word and a piece of sound, so there is no token that is sound alone"
)
_PLACED_BY_MASK = (
    "its config names no placeholder: a mask beside the prompt (image_embeds_position_mask) says where pictures stand"
)

REASONS: dict[str, str] = {
    "blip": (
        "all layers of its text decoder attend to the pictures by cross-attention, and drop the mask over them on the "
        "way, so that rows of a batch which keep different numbers could not be filled up"
    ),
    "evolla": "it takes proteins, and no pictures, videos or sounds; its text attends to them by cross-attention",
    "git": "its text model itself puts the pictures in front of the words, so the prompt holds no token for them",
    "idefics": (
        "its pictures are no tokens of a prompt: gated layers between those of the text model attend to them, and make "
        "their keys anew in each pass"
    ),
    "kosmos-2": _PLACED_BY_MASK,
    "kosmos-2.5": _PLACED_BY_MASK,
    "kyutai_speech_to_text": _BOTH_AT_ONCE,
    "mistral4": (
        "it is a text model, which reads no pictures; with them it is the text model of mistral3, which has a row"
    ),
    "pi0": (
        "its prompt is read for its cache alone: a second model, which makes the actions, attends to that by masks "
        "over the whole prompt"
    ),
    "unlimited_ocr": (
        "all layers of its text model keep the whole prompt beside a window over what is generated, in a cache layer "
        "of their own that is told the length of the prompt"
    ),
    "voxtral_realtime": _BOTH_AT_ONCE,
}
