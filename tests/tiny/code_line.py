"""Tiny models whose pictures are words of a codebook, or patches that no encoder has seen; and one that draws too."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.parts import AUDIO, END, HIDDEN, IMAGE, LAYERS, PAD, START, VOCAB, Family, Piece, build, llama_text, noise

# Words of the codebook in the vocabulary; and the one behind each row of an Emu 3 picture.
CODES = range(120, 152)
ROW_END = 155
SIDE = 16


def _codebook(**changes: Any) -> dict[str, Any]:
    """Return the config of a VQ encoder that makes one code of 4x4 pixels."""
    base = dict(embed_dim=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=1)
    return base | changes


def _chameleon() -> Any:
    words = {f"IMGIMG{_letters(n)}Z": code for n, code in enumerate(CODES)}
    text = llama_text(vocabulary_map={"<image>": IMAGE, **words}, tie_word_embeddings=False)
    text.pop("model_type")
    text.pop("head_dim")
    config = hf.ChameleonConfig(**text, vq_config=_codebook(num_embeddings=len(CODES), resolution=SIDE))
    model = build(hf.ChameleonForConditionalGeneration, config)
    return _spread_codes(model, model.model.vqmodel)


def _letters(number: int) -> str:
    """Return a number as Chameleon's vocabulary spells it."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


def _emu3() -> Any:
    words = {f"<|visual token {n:06d}|>": code for n, code in enumerate(CODES)}
    text = llama_text(attention_dropout=0.0)
    text.pop("model_type")
    config = hf.Emu3Config(
        text_config=text,
        vq_config=_codebook(
            codebook_size=len(CODES), temporal_downsample_factor=2, hidden_size=64, attn_resolutions=[]
        ),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": ROW_END, **words},
    )
    model = build(hf.Emu3ForConditionalGeneration, config)
    return _spread_codes(model, model.model.vqmodel)


def _spread_codes(model: Any, encoder: Any) -> Any:
    """Let the codes of a picture differ: those of random codebooks are all alike."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in encoder.named_parameters():
            if weight.ndim >= 4:
                torch.nn.init.kaiming_normal_(weight)
            elif "quantize" in name:
                torch.nn.init.normal_(weight)
    return model


def _chameleon_image(n: int) -> Piece:
    return Piece((START, *(IMAGE,) * 16, END), {"pixel_values": 2 * noise(n, 1, 3, SIDE, SIDE)})


def _emu3_image(n: int) -> Piece:
    """Return a picture of 4x4 codes or fewer, each row with a word behind it."""
    height, width = ((16, 16), (8, 16), (16, 12))[n % 3]
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    pixels[..., :height, :width] = 2 * noise(n, 1, 3, height, width)
    tokens = height // 4 * (width // 4 + 1)
    arrays = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    return Piece((START, *(IMAGE,) * tokens, END), arrays)


def _fuyu() -> Any:
    text = dict(model_type="persimmon", vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96)
    text |= dict(num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=1024, pad_token_id=PAD)
    text |= dict(hidden_dropout=0.0, attention_dropout=0.0)
    config = hf.FuyuConfig(text_config=text, image_token_id=IMAGE, patch_size=7, image_size=28)
    return build(hf.FuyuForCausalLM, config)


def _fuyu_image(n: int) -> Piece:
    """Return a picture of 24 patches, with a line break behind each row of 6 or 4 of them."""
    columns = (6, 4, 6)[n % 3]
    ids = (*(IMAGE,) * columns, ROW_END) * (24 // columns)
    return Piece((*ids, END), {"pixel_values": noise(n, 1, 24, 3 * 7 * 7)})


def _janus() -> Any:
    eyes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=35, patch_size=7, mlp_ratio=2.0)
    config = hf.JanusConfig(
        vision_config=eyes | dict(projection_dim=HIDDEN, num_image_tokens=25),
        text_config=llama_text(),
        vq_config=_codebook(num_embeddings=8, projection_dim=HIDDEN, image_token_embed_dim=HIDDEN),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(hf.JanusForConditionalGeneration, config)


def _janus_image(n: int) -> Piece:
    return Piece((START, *(IMAGE,) * 25, END), {"pixel_values": noise(n, 1, 3, 35, 35)})


def _apertus1p5() -> Any:
    text = llama_text(hidden_act="xielu", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    text.pop("model_type")
    text.pop("head_dim")
    ears = dict(model_type="wavtokenizer_encoder", num_filters=4, upsampling_ratios=[4, 2], num_lstm_layers=1)
    ears |= dict(hidden_size=16, codebook_dim=16, codebook_size=8, decoder_hidden_size=32)
    config = hf.Apertus1p5Config(
        text_config=text,
        vision_config=_codebook(codebook_size=len(CODES), attn_resolutions=[], resolution=SIDE),
        audio_config=ears,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        image_token_offset=CODES.start,
        audio_token_offset=CODES.stop,
    )
    model = build(hf.Apertus1p5ForConditionalGeneration, config)
    return _spread_codes(model, model.model.vision_tokenizer)


def _apertus1p5_image(n: int) -> Piece:
    height, width = ((4, 4), (3, 6), (6, 4))[n % 3]
    arrays = {
        "pixel_values": noise(n, 1, 3, 4 * height, 4 * width),
        "image_sizes": torch.tensor([[4 * height, 4 * width]]),
    }
    return Piece((START, *(IMAGE,) * (height * width), END), arrays)


def _apertus1p5_audio(n: int) -> Piece:
    """Return a sound of 8 samples for each token."""
    tokens = (20, 12, 16)[n % 3]
    arrays = {"input_values": noise(80 + n, 1, 8 * tokens), "padding_mask": torch.ones(1, 8 * tokens, dtype=torch.long)}
    return Piece((START, *(AUDIO,) * tokens, END), arrays)


def _family(model: Any, image: Any, tower: str) -> Family:
    return Family(model, image, visual_ids=(IMAGE,), tower=tower)


CODE_LINE = {
    "apertus1p5": Family(
        _apertus1p5,
        _apertus1p5_image,
        visual_ids=(IMAGE, AUDIO),
        tower="model.vision_tokenizer",
        audio=_apertus1p5_audio,
        wants="Apertus1p5ForConditionalGeneration",
    ),
    "chameleon": _family(_chameleon, _chameleon_image, "model.vqmodel"),
    "emu3": _family(_emu3, _emu3_image, "model.vqmodel"),
    "fuyu": _family(_fuyu, _fuyu_image, "model.vision_embed_tokens"),
    "janus": _family(_janus, _janus_image, "model.vision_model"),
}
