"""Encoder-decoders whose decoder attends to pictures: tiny random models, each with a batch of two prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tiny.parts import BOS, IMAGE, PAD, VOCAB, build, noise, tower_config


@dataclass(frozen=True)
class Encoded:
    """How to build a model, and what it is shown."""

    model: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]


def _pixels(size: int = 28) -> dict[str, Tensor]:
    return {"pixel_values": noise(3, 2, 3, size, size)}


def _words(pictures: int) -> dict[str, Tensor]:
    """Return two prompts with a picture of so many tokens, the second padded on the left."""
    row = [11, 12, 13, *[IMAGE] * pictures, 14, 15, 16]
    ids = torch.tensor([row, [PAD, PAD, *row[2:]]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _ved() -> Any:
    eyes = hf.ViTConfig(**(tower_config("vit", 28) | {"model_type": "vit"}))
    text = hf.TrOCRConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=64, is_decoder=True, add_cross_attention=True, cross_attention_hidden_size=32,
    )  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eyes, text)
    config.decoder_start_token_id, config.pad_token_id = BOS, PAD
    return build(hf.VisionEncoderDecoderModel, config)


def _pix2struct() -> Any:
    sizes = dict(hidden_size=32, d_kv=8, d_ff=64)
    text = sizes | dict(vocab_size=VOCAB, num_layers=3, num_heads=4, decoder_start_token_id=BOS, use_cache=True)
    eyes = sizes | dict(patch_embed_hidden_size=12, num_hidden_layers=2, num_attention_heads=4, seq_len=32)
    return build(hf.Pix2StructForConditionalGeneration, hf.Pix2StructConfig(text_config=text, vision_config=eyes))


def _patches() -> dict[str, Tensor]:
    places = torch.tensor([[1 + n // 5, 1 + n % 5] for n in range(20)]).float()
    patches = torch.cat([places.expand(2, -1, -1), noise(4, 2, 20, 12)], -1)
    mask = torch.ones(2, 20)
    mask[1, 14:] = 0
    return {"flattened_patches": patches * mask[..., None], "attention_mask": mask}


def _udop() -> Any:
    config = hf.UdopConfig(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4, image_size=28,
        patch_size=7, decoder_start_token_id=BOS, pad_token_id=PAD, max_2d_position_embeddings=64,
    )  # fmt: skip
    return build(hf.UdopForConditionalGeneration, config)


def _page() -> dict[str, Tensor]:
    words = _words(0)
    box = torch.rand(2, words["input_ids"].shape[1], 2, generator=torch.Generator().manual_seed(5)) / 2
    return {**words, "bbox": torch.cat([box, box + 0.2], -1), **_pixels()}


def _t5gemma2() -> Any:
    text = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=2, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    encoder = dict(text_config=text, vision_config=tower_config("siglip_vision_model", 28), mm_tokens_per_image=16)
    encoder |= dict(boi_token_index=103, eoi_token_index=104, image_token_index=IMAGE)
    config = hf.T5Gemma2Config(encoder=encoder, decoder=dict(text), image_token_index=IMAGE, eoi_token_index=104)
    model = build(hf.T5Gemma2ForConditionalGeneration, config)
    model.generation_config.decoder_start_token_id = BOS
    return model


def _florence2() -> Any:
    eyes = dict(
        depths=(1, 1, 1, 1), embed_dim=(8, 16, 16, 32), num_heads=(2, 2, 2, 4), num_groups=(2, 2, 2, 4), window_size=4,
        projection_dim=32,
    )  # fmt: skip
    text = dict(
        model_type="bart", vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=96,
        decoder_start_token_id=BOS, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    config = hf.Florence2Config(vision_config=eyes, text_config=text, image_token_id=IMAGE)
    model = build(hf.Florence2ForConditionalGeneration, config)
    model.generation_config.decoder_start_token_id = BOS
    model.generation_config.forced_eos_token_id = None
    return model


def _pp_formulanet() -> Any:
    eyes = dict(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=128, window_size=4,
        mlp_dim=64, global_attn_indexes=[1], post_conv_in_channels=16, post_conv_mid_channels=16,
        post_conv_out_channels=32, decoder_hidden_size=32,
    )  # fmt: skip
    text = dict(
        vocab_size=VOCAB, d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=64, decoder_start_token_id=BOS, pad_token_id=PAD, bos_token_id=BOS,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = build(hf.PPFormulaNetForConditionalGeneration, hf.PPFormulaNetConfig(vision_config=eyes, text_config=text))
    model.generation_config.decoder_start_token_id = BOS
    model.generation_config.forced_eos_token_id = None
    return model


ENCODED_LINE = {
    "vision-encoder-decoder": Encoded(_ved, _pixels),
    "pix2struct": Encoded(_pix2struct, _patches),
    "udop": Encoded(_udop, _page),
    "t5gemma2": Encoded(_t5gemma2, lambda: {**_words(16), **_pixels()}),
    "florence2": Encoded(_florence2, lambda: {**_words(17), **_pixels(128)}),
    "pp_formulanet": Encoded(_pp_formulanet, lambda: _pixels(128)),
}
