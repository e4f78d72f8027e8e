"""Tiny models that hear only."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.parts import AUDIO, Family, Piece, build, llama_text, noise, qwen2_text

AUDIO_START, AUDIO_END = 105, 106
MELS = 16
FRAMES = 80  # mel frames of a window; shorter sounds are padded to it
LENGTHS = (80, 50, 64)


def _ears(kind: str, **changes: Any) -> dict[str, Any]:
    base = dict(model_type=kind, num_mel_bins=MELS, max_source_positions=FRAMES // 2)
    return base | changes


def _window(n: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return a padded window, its mask and the number of tokens: two convolutions and a pooling, each by two."""
    frames = LENGTHS[n % len(LENGTHS)]
    mask = (torch.arange(FRAMES) < frames).long()[None]
    return noise(80 + n, 1, MELS, FRAMES) * mask[:, None], mask, ((frames - 1) // 2 - 1) // 2 + 1


def _qwen2_audio() -> Any:
    layers = dict(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=32)
    config = hf.Qwen2AudioConfig(
        audio_config=_ears("qwen2_audio_encoder", **layers), text_config=qwen2_text(), audio_token_index=AUDIO
    )
    return build(hf.Qwen2AudioForConditionalGeneration, config)


def _qwen2_audio_sound(n: int) -> Piece:
    sound, mask, tokens = _window(n)
    ids = (AUDIO_START, *(AUDIO,) * tokens, AUDIO_END)
    return Piece(ids, {"input_features": sound, "feature_attention_mask": mask})


def _small(kind: str, **changes: Any) -> dict[str, Any]:
    return _ears(kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64) | changes


def _voxtral() -> Any:
    ears = _small("voxtral_encoder", intermediate_size=128)
    config = hf.VoxtralConfig(audio_config=ears, text_config=llama_text(), audio_token_id=AUDIO)
    return build(hf.VoxtralForConditionalGeneration, config)


def _voxtral_sound(n: int) -> Piece:
    """Return a sound of whole windows, 10 tokens each."""
    windows = (2, 1, 3)[n % 3]
    return Piece((AUDIO_START, *(AUDIO,) * (10 * windows)), {"input_features": noise(80 + n, windows, MELS, FRAMES)})


def _audioflamingo3() -> Any:
    config = hf.AudioFlamingo3Config(
        audio_config=_small("audioflamingo3_encoder"), text_config=qwen2_text(), audio_token_id=AUDIO
    )
    return build(hf.AudioFlamingo3ForConditionalGeneration, config)


def _audioflamingo3_sound(n: int) -> Piece:
    sound, mask, tokens = _window(n)
    return Piece((AUDIO,) * tokens, {"input_features": sound, "input_features_mask": mask})


def granite_config(config: Any, encoder: dict[str, Any], projector: dict[str, Any]) -> Any:
    """Return the config of a Granite speech model, with changes of its encoder and its projector."""
    ears = dict(input_dim=MELS, num_layers=2, hidden_dim=32, feedforward_mult=2, num_heads=4, output_dim=10)
    ears |= dict(context_size=15, max_pos_emb=16, dropout=0.0, conv_kernel_size=3)
    queries = dict(model_type="blip_2_qformer", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    queries |= dict(intermediate_size=64, encoder_hidden_size=32, cross_attention_frequency=1)
    return config(
        text_config=llama_text(model_type="granite", attention_multiplier=0.25),
        encoder_config=ears | encoder,
        projector_config=queries | projector,
        audio_token_index=AUDIO,
        has_lora_adapter=False,
        downsample_rate=5,
        window_size=15,
    )


def _granite_speech() -> Any:
    config = granite_config(hf.GraniteSpeechConfig, {}, {})
    return build(hf.GraniteSpeechForConditionalGeneration, config)


def granite_sound(n: int) -> Piece:
    """Return a sound of windows of 15 frames with 3 tokens each."""
    windows = 6
    mask = torch.ones(1, 3 * windows, dtype=torch.bool)
    arrays = {"input_features": noise(80 + n, 1, 15 * windows, MELS), "input_features_mask": mask}
    return Piece((AUDIO,) * (3 * windows), arrays)


def audio_family(model: Any, sound: Any, tower: str = "model.audio_tower", wants: str = "") -> Family:
    """Return a family that hears only."""
    return Family(model, visual_ids=(AUDIO,), tower=tower, audio=sound, wants=wants)


AUDIO_LINE = {
    "qwen2_audio": audio_family(_qwen2_audio, _qwen2_audio_sound),
    "voxtral": audio_family(_voxtral, _voxtral_sound),
    "audioflamingo3": audio_family(_audioflamingo3, _audioflamingo3_sound),
    "granite_speech": audio_family(_granite_speech, granite_sound, "model.encoder"),
}
