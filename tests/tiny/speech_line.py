"""Tiny models that write down what they hear."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.audio_line import MELS, audio_family, granite_config, granite_sound
from tiny.parts import AUDIO, HIDDEN, Family, Piece, build, llama_text, noise

# Mel frames of a window, and of the sounds in it.
WINDOW = 160
LENGTHS = (160, 100, 128)


def _small(**changes: Any) -> dict[str, Any]:
    base = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_mel_bins=MELS)
    return base | changes


def _qwen3(**changes: Any) -> dict[str, Any]:
    return llama_text(model_type="qwen3") | changes


def _window(n: int, frames: int = WINDOW) -> tuple[dict[str, torch.Tensor], int]:
    """Return a padded window (mels, frames) with its mask, and the frames of the sound in it."""
    length = LENGTHS[n % len(LENGTHS)] * frames // WINDOW
    mask = (torch.arange(frames) < length).long()[None]
    return {"input_features": noise(80 + n, 1, MELS, frames) * mask[:, None], "input_features_mask": mask}, length


def _fun_asr_nano() -> Any:
    ears = _small(num_stacked_frames=2, num_timestamp_prediction_layers=1, fsmn_kernel_size=3)
    ears |= dict(hidden_dropout=0.0, attention_dropout=0.0, model_type="fun_asr_nano_encoder")
    adaptor = dict(hidden_size=HIDDEN, num_attention_heads=4, intermediate_size=HIDDEN // 4, num_hidden_layers=1)
    config = hf.FunAsrNanoConfig(
        audio_config=ears,
        adaptor_config=adaptor | dict(projector_hidden_size=48),
        text_config=_qwen3(),
        audio_token_id=AUDIO,
        tie_word_embeddings=False,
    )
    return build(hf.FunAsrNanoForConditionalGeneration, config)


def _fun_sound(n: int) -> Piece:
    """Return a sound of stacked frames, each of them a token."""
    length = (20, 13, 17)[n % 3]
    mask = (torch.arange(20) < length).long()[None]
    arrays = {"input_features": noise(80 + n, 1, 20, 2 * MELS) * mask[..., None], "input_features_mask": mask}
    return Piece((AUDIO,) * length, arrays)


def _glmasr() -> Any:
    ears = _small(intermediate_size=128, model_type="glmasr_encoder")
    config = hf.GlmAsrConfig(
        audio_config=ears, text_config=llama_text(), audio_token_id=AUDIO, tie_word_embeddings=False
    )
    return build(hf.GlmAsrForConditionalGeneration, config)


def _glmasr_sound(n: int) -> Piece:
    arrays, length = _window(n)
    return Piece((AUDIO,) * (((length - 1) // 2 + 1 - 4) // 4 + 1), arrays)


def _granite_speech_plus() -> Any:
    config = granite_config(hf.GraniteSpeechPlusConfig, {"cat_hidden_layers": [1]}, {"encoder_hidden_size": 64})
    return build(hf.GraniteSpeechPlusForConditionalGeneration, config)


def _moss_transcribe_diarize() -> Any:
    config = hf.MossTranscribeDiarizeConfig(
        audio_config=_small(max_source_positions=WINDOW // 2),
        text_config=_qwen3(),
        audio_token_id=AUDIO,
        tie_word_embeddings=False,
    )
    return build(hf.MossTranscribeDiarizeForConditionalGeneration, config)


def _moss_sound(n: int) -> Piece:
    """Return a sound of which two frames become one, and four of those a token."""
    arrays, length = _window(n)
    return Piece((AUDIO,) * (((length - 1) // 2 + 1 + 3) // 4), arrays)


def _qwen3_asr() -> Any:
    ears = dict(num_mel_bins=MELS, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=32)
    ears |= dict(n_window=50, n_window_infer=200, downsample_hidden_size=8, output_dim=HIDDEN)
    config = hf.Qwen3ASRConfig(
        audio_config=ears, text_config=_qwen3(), audio_token_id=AUDIO, pad_token_id=0, tie_word_embeddings=False
    )
    return build(hf.Qwen3ASRForConditionalGeneration, config)


def _qwen3_asr_sound(n: int) -> Piece:
    """Return a sound of windows of 100 frames, 13 tokens each, the rest in eighths."""
    length, tokens = ((200, 26), (150, 20), (170, 22))[n % 3]
    mask = (torch.arange(200) < length).long()[None]
    arrays = {"input_features": noise(80 + n, 1, MELS, 200) * mask[:, None], "input_features_mask": mask}
    return Piece((AUDIO,) * tokens, arrays)


HOP = 4


def _vibevoice_asr() -> Any:
    ears = dict(hidden_size=16, num_filters=8, downsampling_ratios=[2, 2], depths=[1, 1, 1], kernel_size=3)
    ears |= dict(vae_std=0.0, layer_scale_init_value=1.0, model_type="vibevoice_acoustic_tokenizer_encoder")
    config = hf.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config=dict(ears),
        semantic_tokenizer_encoder_config=dict(ears, hidden_size=24),
        text_config=llama_text(model_type="qwen2"),
        audio_token_id=AUDIO,
        acoustic_tokenizer_chunk_size=40 * HOP,
    )
    return build(hf.VibeVoiceAsrForConditionalGeneration, config)


def _wave(n: int, samples: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return a padded wave (1, samples), its mask and its own length."""
    length = (samples, samples * 5 // 8, samples * 3 // 4)[n % 3]
    mask = (torch.arange(samples) < length)[None]
    return noise(80 + n, 1, samples) * mask, mask, length


def _vibevoice_sound(n: int) -> Piece:
    sound, mask, length = _wave(n, 32 * HOP)
    return Piece((AUDIO,) * (length // HOP), {"input_values": sound[:, None], "padding_mask": mask})


def _omniasr() -> Any:
    ears = _small(conv_dim=[16, 16], conv_kernel=[4, 2], conv_stride=[4, 2], num_conv_pos_embeddings=4)
    ears |= dict(num_conv_pos_embedding_groups=2, hidden_dropout=0.0, layerdrop=0.0, activation_dropout=0.0)
    ears.pop("num_mel_bins")
    config = hf.OmniASRConfig(audio_config=ears, text_config=llama_text(), audio_token_id=AUDIO, pad_token_id=0)
    return build(hf.OmniASRForConditionalGeneration, config)


def _omniasr_sound(n: int) -> Piece:
    sound, mask, length = _wave(n, 192)
    return Piece((AUDIO,) * (length // 8), {"input_values": sound[:, None], "padding_mask": mask.long()})


def _family(model: Any, sound: Any, wants: str, tower: str = "model.audio_tower") -> Family:
    return audio_family(model, sound, tower, wants=f"{wants}ForConditionalGeneration")


SPEECH_LINE = {
    "fun_asr_nano": _family(_fun_asr_nano, _fun_sound, "FunAsrNano"),
    "glmasr": _family(_glmasr, _glmasr_sound, "GlmAsr"),
    "granite_speech_plus": _family(_granite_speech_plus, granite_sound, "GraniteSpeechPlus", "model.encoder"),
    "moss_transcribe_diarize": _family(_moss_transcribe_diarize, _moss_sound, "MossTranscribeDiarize"),
    "qwen3_asr": _family(_qwen3_asr, _qwen3_asr_sound, "Qwen3ASR"),
    "vibevoice_asr": _family(_vibevoice_asr, _vibevoice_sound, "VibeVoiceAsr", "model.acoustic_tokenizer_encoder"),
    "omniasr": _family(_omniasr, _omniasr_sound, "OmniASR"),
}
