"""Signals are the dense model's under FlashAttention's masks, with caches of fixed size, and on a filled cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_flash import FlashText, reference_flash
from test_signals_text_model import (
    Chooser,
    Probe,
    attention,
    expected_attention,
    picked,
    probe,
    prompts,
    says,
    words_of,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cache_role
import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Attention, Projection, States
from mllm_squeeze.registry import register_reducer, unregister_reducer

CUT = 3
NEEDS = (
    Attention(rows="last"),
    Attention(rows="last", block="next"),
    Attention(rows="text", block=0),
    Attention(rows="visual", heads="each", over_rows="each"),
    Attention(rows="visual", block="next"),
    Attention(rows="all"),
    Attention(rows="all", block="next", over_rows="max", heads="max"),
)
KEY = Projection("key", heads="each")
RECIPE = {"method": "probing", "steps": [{"reducer": "probe", "at": {"layer": CUT}, "ratio": 0.5}]}


@pytest.fixture(autouse=True)
def reducers() -> Any:
    """Register the probe for a test."""
    register_reducer("probe", Probe)
    register_reducer("chooser", Chooser)
    yield
    unregister_reducer("probe")
    unregister_reducer("chooser")


def check(tokens: VisualTokens, layout: Any, maps_of: list[torch.Tensor]) -> None:
    """Compare attention with the maps (B, H, T, K) of a dense pass, the last columns of which are the pass's own."""
    for need in NEEDS:
        number = CUT if need.block == "next" else CUT + need.block if need.block < 0 else need.block
        for row, span in enumerate(layout.spans):
            maps = maps_of[number][span.sample][..., -layout.length :]
            columns, words = torch.tensor(span.columns), words_of(layout, span.sample)
            wanted = expected_attention(need, maps, columns, words, layout.real[span.sample])
            torch.testing.assert_close(picked(tokens, need, row), wanted, rtol=1e-5, atol=1e-5, msg=says(need))


@pytest.mark.parametrize("kind", ["two_images", "batch"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_masks_of_flash_attention(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "flash_attention_2", reference_flash)
    monkeypatch.setitem(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, "flash_attention_2", flash_attention_mask)
    inputs, dense = prompts(family, kind)
    t = tiny.load(family)
    with FlashText(t.model):
        tokens, layout, _ = probe(family, inputs, NEEDS, "flash_attention_2")
    check(tokens, layout, dense.maps)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cache_of_fixed_size(family: str, implementation: str) -> None:
    """It hands out empty slots behind the keys."""
    inputs, dense = prompts(family, "batch")
    t = tiny.load(family)
    width = inputs["input_ids"].shape[1]
    cache = transformers.StaticCache(config=t.model.config.get_text_config(), max_cache_len=width + 7)
    tokens, layout, _ = probe(family, inputs, (*NEEDS, KEY), implementation, cache=cache)
    check(tokens, layout, dense.maps)
    for row, span in enumerate(layout.spans):
        keys = dense.cache.layers[CUT - 1].keys.transpose(1, 2)[span.sample, torch.tensor(span.columns)]
        torch.testing.assert_close(tokens[KEY][row][tokens.mask[row]], keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3_window"])
def test_a_prompt_on_a_filled_cache(family: str, implementation: str) -> None:
    """Words of an earlier pass are keys as well; the rows and columns of a rule are those of its own pass."""
    inputs, _ = prompts(family, "two_images")
    t = tiny.load(family)
    ids = inputs["input_ids"]
    past = int(t.visual(inputs)[0].nonzero()[0]) - 1
    where = oracle.positions(t.model, inputs, 0)
    names = [name for name, value in inputs.items() if value.shape[:2] == ids.shape and name != "attention_mask"]
    mask = torch.ones_like(ids)
    Probe.wanted = NEEDS

    def call(start: int, end: int, others: dict[str, Any], cache: Any, **extra: Any) -> Any:
        given = {name: inputs[name][:, start:end] for name in names}
        given |= {"attention_mask": mask[:, :end], "position_ids": where[..., start:end], **others}
        return t.model(**given, **cache_role.given(cache), use_cache=True, **extra)

    pictures = {name: value for name, value in inputs.items() if name not in names and name != "attention_mask"}
    with torch.no_grad():
        with attention(t, "eager"):
            cache = cache_role.of_output(call(0, past, {}, None))
            dense = call(past, ids.shape[1], pictures, cache, output_attentions=True).attentions
        with attention(t, implementation):
            cache = cache_role.of_output(call(0, past, {}, None))
            with squeeze.applied(t.model, RECIPE) as handle:
                call(past, ids.shape[1], pictures, cache)
                check(Probe.seen[-1], handle.layout, list(dense))


def test_decode_steps_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hooked for a prefill stays idle behind it."""
    read: list[Any] = []
    monkeypatch.setattr("mllm_squeeze.engine.signals.sources.Sources._keep", lambda *args: read.append(args[2]))
    t = tiny.load("llava")
    Probe.wanted = (States("gate"), Projection("key", rope=False), Attention())
    recipe = {"method": "probing", "steps": [{"reducer": "probe", "at": {"layer": CUT}}]}
    with squeeze.applied(t.model, recipe | {"steps": [recipe["steps"][0] | {"ratio": 0.0}]}):
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 0))
        prefill = len(read)
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 3))
    assert prefill == 3
    assert len(read) == 2 * prefill
