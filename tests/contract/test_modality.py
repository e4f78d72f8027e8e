"""A step may say which of images, videos and sounds it reduces, so that one recipe has a rule for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
import oracle
import tiny

STEPS: list[dict[str, Any]] = [
    {"at": {"layer": 1}, "ratio": 0.25, "modality": "image", "select": "stride"},
    {"at": {"layer": 1}, "ratio": 0.75, "modality": "video", "select": "even_sample"},
]


def left(t: tiny.TinyModel, kind: str, steps: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return for each modality of a prompt how many tokens there were, and how many are left."""
    with squeeze.applied(t.model, {"method": "mixed", "steps": steps}) as handle:
        oracle.run(t.model, t.inputs[kind], oracle.forced_tokens(1, 1))
        kept = set(handle.cuts[-1].kept[0].tolist())
        return {span.modality: (span.length, len(kept & set(span.columns))) for span in handle.layout.spans}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_recipe_for_images_and_one_for_videos(family: str) -> None:
    t = tiny.load(family)
    found = left(t, "image_video", STEPS)
    for modality, share in (("image", 0.75), ("video", 0.25)):
        length, stays = found[modality]
        assert stays == int(length * share + 0.5)


def test_what_is_not_named_stays_whole() -> None:
    t = tiny.load("qwen2_5_vl")
    length, stays = left(t, "image_video", STEPS[1:])["image"]
    assert stays == length
    with squeeze.applied(t.model, {"method": "mixed", "steps": STEPS[1:]}) as handle, torch.no_grad():
        with pytest.warns(squeeze.SqueezeWarning, match="reduces video tokens"):
            t.model(**t.inputs["image"])
        assert handle.cuts == ()


def test_a_family_without_the_modality_is_refused() -> None:
    model, step = tiny.load("llava").model, STEPS[0] | {"modality": "audio"}
    with pytest.raises(squeeze.SqueezeError, match="reduces audio tokens"):
        squeeze.apply(model, {"method": "mixed", "steps": [step]})


def test_a_word_that_is_no_modality_is_refused() -> None:
    model, step = tiny.load("llava").model, STEPS[0] | {"modality": "text"}
    with pytest.raises(squeeze.SqueezeError, match="modality"):
        squeeze.apply(model, {"method": "mixed", "steps": [step]})


def test_the_facts_of_a_method_are_those_of_its_steps() -> None:
    told = squeeze.describe({"method": "mixed", "steps": STEPS[1:]})
    assert told["facts"]["modalities"] == ["video"]
