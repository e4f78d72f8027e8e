"""Omni models as a whole: the thinker is found and cut, and what speaks for it goes on speaking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from tiny.moe_line import AUDIO_END, AUDIO_START
from tiny.parts import AUDIO, END, HIDDEN, IMAGE, START, VIDEO

pytestmark = pytest.mark.quick
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
BIN = dict(tts_text_start_token_id=130, tts_text_end_token_id=131, tts_text_pad_token_id=132)
CODES = dict(
    tts_codec_start_token_id=60, tts_codec_end_token_id=61, tts_codec_pad_token_id=62, tts_codec_mask_token_id=63
)
SETTINGS: dict[str, Any] = dict(thinker_max_new_tokens=4, talker_max_new_tokens=5, talker_eos_token_id=[61])
CUTS: dict[str, dict[str, Any]] = {
    "divprune": dict(ratio=0.5),
    "fastv": dict(ratio=0.5, layer=2),
    "pyramiddrop": matrix.method("pyramiddrop").params,
}


def speaking() -> tuple[Any, tiny.TinyModel]:
    """Return a whole Qwen2.5-Omni, and the tiny model whose weights its thinker has."""
    t = tiny.load("qwen2_5_omni")
    talker = dict(vocab_size=64, embedding_size=HIDDEN, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    talker |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_parameters=ROPE, **BIN, **CODES)
    talker |= dict(audio_token_index=AUDIO, image_token_index=IMAGE, video_token_index=VIDEO)
    talker |= dict(vision_start_token_id=START, vision_end_token_id=END)
    talker |= dict(audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END)
    waves = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, emb_dim=16, num_embeds=65)
    waves |= dict(mel_dim=8, block_size=8, enc_emb_dim=16, enc_dim=8, enc_channels=[16, 16, 16, 16, 48])
    waves |= dict(enc_attention_channels=8, look_ahead_layers=[1], look_backward_layers=[0], dropout=0.0)
    voice = dict(mel_dim=8, upsample_initial_channel=64, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3, 5]])
    voice |= dict(upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4])
    config = hf.Qwen2_5OmniConfig(
        thinker_config=t.model.config.to_dict(),
        talker_config=talker,
        token2wav_config=dict(dit_config=waves, bigvgan_config=voice),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.Qwen2_5OmniForConditionalGeneration(config).eval()
        model.speaker_map = {"Chelsie": dict(bos_token=133, cond=torch.randn(1, 16), ref_mel=torch.randn(1, 30, 8))}
    model.thinker.load_state_dict(t.model.state_dict())
    model.thinker.generation_config = t.model.generation_config
    return model, t


@pytest.fixture(scope="module")
def whole() -> tuple[Any, tiny.TinyModel]:
    return speaking()


def said(model: Any, inputs: tiny.Inputs, **settings: Any) -> Any:
    """Return what generate() gives, with the dice of the voice as they are each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.generate(**{k: v.clone() for k, v in inputs.items()}, **SETTINGS, **settings)


@pytest.mark.parametrize("method", CUTS)
@pytest.mark.parametrize("kind", ["image", "video", "audio", "audio_image"])
def test_what_is_written_is_what_the_thinker_alone_writes(
    whole: tuple[Any, tiny.TinyModel], kind: str, method: str
) -> None:
    model, t = whole
    inputs = t.inputs[kind]
    with squeeze.applied(t.model, method, **CUTS[method]) as handle:
        alone = t.model.generate(**{k: v.clone() for k, v in inputs.items()}, max_new_tokens=4)
        cuts = [cut.index for cut in handle.cuts]
    with squeeze.applied(model, method, **CUTS[method]) as handle:
        assert torch.equal(said(model, inputs, generation_mode="text"), alone)
        assert [cut.index.tolist() for cut in handle.cuts] == [index.tolist() for index in cuts]
        assert handle.cuts


@pytest.mark.parametrize("method", CUTS)
def test_it_speaks(whole: tuple[Any, tiny.TinyModel], method: str) -> None:
    """The talker gets a state for each token of the prompt; a ratio of nothing changes no sample."""
    model, t = whole
    inputs = t.inputs["audio"]
    dense = said(model, inputs)
    with squeeze.applied(model, method, **CUTS[method]):
        text, sound = said(model, inputs)
        assert torch.equal(text, said(model, inputs, generation_mode="text"))
    assert torch.isfinite(sound).all() and sound.numel()
    if matrix.method(method).nothing:
        with squeeze.applied(model, method, **CUTS[method] | matrix.method(method).nothing):
            again = said(model, inputs)
        assert torch.equal(again[0], dense[0]) and torch.equal(again[1], dense[1])
    assert all(torch.equal(a, b) for a, b in zip(said(model, inputs), dense, strict=True)), "something stayed behind"


@pytest.mark.parametrize("method", CUTS)
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_the_states_of_all_layers_have_the_length_of_the_prompt(
    whole: tuple[Any, tiny.TinyModel], kind: str, method: str
) -> None:
    """Survivors as in the masked dense model; those that were cut as they were in front of the layer that lost them."""
    model, t = whole
    inputs = t.inputs[kind]
    with squeeze.applied(model, method, **CUTS[method]) as handle, torch.no_grad():
        found = model.thinker(**{k: v.clone() for k, v in inputs.items()}, output_hidden_states=True).hidden_states
        cuts = handle.cuts
    with oracle.masked(model.thinker, inputs["input_ids"].shape[1], cuts), torch.no_grad():
        dense = model.thinker(**{k: v.clone() for k, v in inputs.items()}, output_hidden_states=True).hidden_states
    assert len(found) == len(dense)
    # Of the last layer the states are behind the norm.
    for number, (mine, theirs) in enumerate(zip(found[:-1], dense[:-1], strict=True)):
        oracle.assert_close(mine, expected(theirs, dense, cuts, number), f"in front of layer {number}")
    assert found[-1].shape == dense[-1].shape


def expected(states: Tensor, dense: tuple[Tensor, ...], cuts: Any, layer: int) -> Tensor:
    """Return the dense states in front of a layer, of cut tokens those in front of the layer of their cut."""
    out = states.clone()
    for cut in reversed([cut for cut in cuts if cut.layer <= layer]):
        gone = torch.ones(out.shape[:2], dtype=torch.bool).scatter(1, cut.index, False)
        out[gone] = dense[cut.layer][gone]
    return out
