"""Tiny models whose images become a fixed number of queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tiny.parts import BOS, HIDDEN, IMAGE, LAYERS, PAD, SPECIAL, VIDEO, VOCAB, Family, Piece, build, llama_text, noise

QUERIES = 16


def _build(cls: Any, config: Any) -> Any:
    """Build the model; its text model generates by a generation config of its own."""
    model = build(cls, config)
    generation = model.language_model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    generation.suppress_tokens, generation.do_sample = list(SPECIAL), False
    return model


def _parts() -> dict[str, Any]:
    base = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return dict(
        vision_config=base | dict(image_size=28, patch_size=7),
        qformer_config=base | dict(vocab_size=VOCAB),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )


def _blip_2() -> Any:
    text = dict(model_type="opt", vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=96, num_hidden_layers=LAYERS)
    text |= dict(num_attention_heads=4, max_position_embeddings=512, word_embed_proj_dim=HIDDEN, dropout=0.0)
    text |= dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2)
    return _build(hf.Blip2ForConditionalGeneration, hf.Blip2Config(text_config=text, **_parts()))


def _blip_2_t5() -> Any:
    text = dict(model_type="t5", vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    text |= dict(num_decoder_layers=2, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=2)
    return _build(hf.Blip2ForConditionalGeneration, hf.Blip2Config(text_config=text, **_parts()))


def _instructblip() -> Any:
    config = hf.InstructBlipConfig(text_config=llama_text(), **_parts())
    return _build(hf.InstructBlipForConditionalGeneration, config)


def _instructblipvideo() -> Any:
    parts = _parts() | {"video_token_index": VIDEO}
    parts.pop("image_token_index")
    config = hf.InstructBlipVideoConfig(text_config=llama_text(), **parts)
    return _build(hf.InstructBlipVideoForConditionalGeneration, config)


def _aria() -> Any:
    eyes = dict(model_type="idefics3_vision", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    text = llama_text(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, intermediate_size=32)
    text.pop("model_type")
    config = hf.AriaConfig(
        vision_config=eyes | dict(num_attention_heads=4, image_size=56, patch_size=7),
        text_config=hf.AriaTextConfig(**text),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={64: QUERIES},
    )
    return build(hf.AriaForConditionalGeneration, config)


def _aria_image(n: int) -> Piece:
    """Return a picture, or one in two crops."""
    crops = 2 if n % 3 == 2 else 1
    arrays = {"pixel_values": noise(n, crops, 3, 56, 56), "pixel_mask": torch.ones(crops, 56, 56, dtype=torch.bool)}
    return Piece((IMAGE,) * (QUERIES * crops), arrays)


def _image(n: int) -> Piece:
    return Piece((IMAGE,) * QUERIES, {"pixel_values": noise(n, 1, 3, 28, 28)})


def _asked_image(n: int) -> Piece:
    """Return an image with the instruction that its queries read."""
    words = 3 + n % 3
    asked = {
        "qformer_input_ids": torch.arange(5, 5 + words)[None],
        "qformer_attention_mask": torch.ones(1, words, dtype=torch.long),
    }
    return Piece((IMAGE,) * QUERIES, {"pixel_values": noise(n, 1, 3, 28, 28), **asked})


def _asked_video(n: int) -> Piece:
    """Return a video of three frames, each of which becomes as many queries as an image."""
    arrays = {**_asked_image(n).arrays, "pixel_values": noise(50 + n, 1, 3, 3, 28, 28)}
    return Piece((VIDEO,) * (3 * QUERIES), arrays)


def _decoder_start(ids: Tensor, _: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"decoder_input_ids": torch.full((ids.shape[0], 1), PAD)}


_ONLY: dict[str, Any] = dict(visual_ids=(IMAGE,), tower="vision_model", before=(), lacks=("text",))
QUERY_LINE = {
    "blip_2": Family(_blip_2, _image, **_ONLY),
    "blip_2_t5": Family(_blip_2_t5, _image, derived=_decoder_start, **_ONLY),
    "instructblip": Family(_instructblip, _asked_image, **_ONLY),
    "instructblipvideo": Family(_instructblipvideo, video=_asked_video, **(_ONLY | {"visual_ids": (VIDEO,)})),
    "aria": Family(_aria, _aria_image, visual_ids=(IMAGE,)),
}
