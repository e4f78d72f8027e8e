"""What each word of `layer_types` means for a cut; what cannot be cut exactly, and what nobody knows, is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import configuration_utils

import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import proof
from mllm_squeeze.family.structure import find_parts
from mllm_squeeze.upstream.layer_kinds import KINDS

pytestmark = pytest.mark.quick

MEANINGS = {
    "full": {"full_attention", "attention"},
    "windowed": {"sliding_attention", "chunked_attention"},
    "recurrent": {"linear_attention", "conv", "mamba", "recurrent"},
    "unsupported": {
        "window_attention",
        "indexed_attention",
        "deepseek_sparse_attention",
        "qwen_sparse_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "minimax_m3_sparse",
        "hybrid",
        "hybrid_sliding",
        "reference_sliding_attention",
        "moe",
        "mlp",
    },
}
UNSUPPORTED = sorted(MEANINGS["unsupported"])


def named(words: list[str] | None, **more: Any) -> tiny.TinyModel:
    """Return a tiny LLaVA whose text config calls its four layers so."""
    t = tiny.fresh("llava")
    config = oracle.text_model(t.model).config
    config.layer_types = words
    for name, value in more.items():
        setattr(config, name, value)
    return t


@pytest.mark.parametrize(("meaning", "word"), [(m, w) for m, words in MEANINGS.items() for w in sorted(words)])
def test_what_a_word_means(meaning: str, word: str) -> None:
    assert KINDS[word].meaning == meaning
    assert (KINDS[word].why != "") == (meaning == "unsupported")
    assert (KINDS[word].window != "") == (meaning == "windowed")


def test_no_word_is_forgotten() -> None:
    """A word that transformers allows and that stands in no row of the table is one that nobody looked at."""
    assert set().union(*MEANINGS.values()) == set(KINDS)
    assert set(configuration_utils.ALLOWED_ATTN_LAYER_TYPES) <= set(KINDS)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_an_unknown_word_is_refused(method: str) -> None:
    t = named(["full_attention", "spiral_attention", "full_attention", "spiral_attention"])
    before = snapshot.snapshot(t.model)
    with pytest.raises(squeeze.SqueezeError, match=r"'llama' calls layers 1, 3 'spiral_attention'") as caught:
        squeeze.apply(t.model, method)
    assert isinstance(caught.value, TypeError)
    assert "full_attention, sliding_attention" in str(caught.value)
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("word", UNSUPPORTED)
def test_a_word_that_cannot_be_cut_is_refused(word: str) -> None:
    t = named(["full_attention", "full_attention", word, "full_attention"])
    before = snapshot.snapshot(t.model)
    with pytest.raises(squeeze.SqueezeError, match=rf"'llama' cannot be cut exactly.*layer 2 '{word}'") as caught:
        squeeze.apply(t.model, "divprune")
    assert KINDS[word].why in str(caught.value)
    with pytest.raises(squeeze.SqueezeError, match=word):
        squeeze.check(t.model)
    snapshot.assert_same(before, snapshot.snapshot(t.model))


def test_a_word_too_few_is_refused() -> None:
    with pytest.raises(squeeze.SqueezeError, match=r"has 4 layers, and its config says of 3"):
        squeeze.apply(named(["full_attention"] * 3).model, "divprune")


def test_a_window_without_a_size_is_refused() -> None:
    words = ["full_attention", "sliding_attention"] * 2
    assert find_parts(named(words, sliding_window=9).model).window(1) == 9
    for size in (None, "wide"):
        with pytest.raises(squeeze.SqueezeError, match=r"Layer 1 .*'llama' is 'sliding_attention'.*`sliding_window`"):
            squeeze.apply(named(words, sliding_window=size).model, "divprune")


def test_what_was_applied_can_be_removed_whatever_became_of_the_config() -> None:
    t = tiny.fresh("llava")
    before = snapshot.snapshot(t.model)
    squeeze.apply(t.model, "divprune")
    config = oracle.text_model(t.model).config
    config.layer_types = ["spiral_attention"] * 4
    squeeze.remove(t.model)
    del config.layer_types
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("family", ["llama4", "gemma3_window", "mistral3", "lfm2_vl", "llava"])
def test_windows_of_real_configs(family: str) -> None:
    parts = find_parts(tiny.load(family).model)
    config = parts.text_config
    found = [parts.window(number) for number in range(len(parts.layers))]
    sizes = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    words = getattr(config, "layer_types", None) or ["full_attention"] * len(found)
    assert found == [sizes.get(word) for word in words]
    assert any(found) == (family in ("llama4", "gemma3_window"))
    assert [parts.has_entries(number) for number in range(len(found))] == [word != "conv" for word in words]


@proof.llama4
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_chunks_that_are_shorter_than_the_prompt(method: str) -> None:
    """A layer that sees one chunk of the prompt goes by the tokens that were, not by those that are left."""
    t = tiny.fresh("llama4")
    config = oracle.text_model(t.model).config
    config.attention_chunk_size = 12
    assert t.inputs["image"]["input_ids"].shape[1] > 2 * 12
    proof.squeeze_and_prove(t, "image", method)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}


def without_weights(name: str, text: dict[str, Any], **more: Any) -> Any:
    """Return a model of a class that nobody has tried, on the meta device."""
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, **text}, vision_config=SIZES, **more)
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def test_a_family_that_picks_blocks_of_keys_is_refused() -> None:
    """MiniMax M3: the sparse layers of its text model choose blocks of keys by their places in the cache."""
    words = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"]
    sizes = {"dense_intermediate_size": 64, "shared_intermediate_size": 64, "rotary_dim": 4, "num_local_experts": 4}
    ids = {"image_token_index": 100, "video_token_index": 101}
    model = without_weights("MiniMaxM3VL", {"layer_types": words, **sizes}, **ids)
    with pytest.raises(squeeze.SqueezeError, match=r"layers 1, 2 'minimax_m3_sparse'.*blocks of keys"):
        squeeze.apply(model, "divprune")
    model.config.get_text_config().layer_types = ["full_attention"] * 4
    assert find_parts(model).has_entries(1)


def test_a_family_whose_encoder_alone_has_windows_is_not() -> None:
    """Muse Glimmer: its text model slides, and only the vision encoder has windows, which no cut comes near."""
    ids = {"image_token_id": 100, "video_token_id": 101}
    model = without_weights("MuseGlimmer", {"sliding_window": 7, "layer_rope_theta": None}, **ids)
    assert "window_attention" in model.config.vision_config.layer_types
    parts = find_parts(model)
    assert [parts.window(number) for number in range(4)] == [7, 7, 7, None]
