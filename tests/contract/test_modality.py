"""A step may say which of images, videos and sounds it reduces, so that one recipe has a rule for each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
import oracle
import tiny
from contract.test_equivalence import squeeze_and_prove
from mllm_squeeze.reducers.decode_refresh import DecodeRefresh
from mllm_squeeze.reducers.pipeline import Pipeline

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


# One recipe for pictures and for clips

MIXED: list[dict[str, Any]] = [
    {"at": "projector", "ratio": 0.5, "modality": "video", "segment": "frame", "select": "stride"},
    {"at": {"layer": 2}, "ratio": 0.75, "modality": "video", "score": "attention", "select": "top_k"},
    {"at": {"layer": 1}, "ratio": 0.25, "modality": "image", "score": "attention", "select": "top_k"},
]


@contextmanager
def registered(steps: list[dict[str, Any]]) -> Iterator[str]:
    """Register steps as a method inside the block, and return its name."""
    squeeze.register_method("mixed", {"method": "mixed", "steps": steps})
    try:
        yield "mixed"
    finally:
        squeeze.unregister_method("mixed")


@pytest.mark.parametrize("kind", ["image_video", "image", "video"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_mixed_prompt_is_masking_of_its_survivors(family: str, kind: str) -> None:
    """The rule for pictures stands last and acts between the two for clips; budgets of one do not bind the other."""
    t = tiny.load(family)
    with registered(MIXED) as name:
        squeeze_and_prove(t, t.inputs[kind], name)
    with warnings.catch_warnings(), squeeze.applied(t.model, {"method": "mixed", "steps": MIXED}) as handle:
        warnings.simplefilter("error", squeeze.SqueezeWarning)
        oracle.run(t.model, t.inputs[kind], oracle.forced_tokens(1, 1))
        assert [cut.layer for cut in handle.cuts] == {"image": [1], "video": [0, 2]}.get(kind, [0, 1, 2])
        told = str(handle.report())
    assert ("it reduces video tokens, and the prompt holds none" in told) == (kind == "image")
    assert ("it reduces image tokens, and the prompt holds none" in told) == (kind == "video")


def test_what_is_left_is_what_each_step_asks() -> None:
    t = tiny.load("qwen2_5_vl")
    found = left(t, "image_video", MIXED)
    for modality, share in (("image", 0.75), ("video", 0.25)):
        length, stays = found[modality]
        assert stays == int(length * share + 0.5)


def test_a_model_of_pictures_runs_the_steps_for_pictures_and_says_so() -> None:
    t = tiny.load("llava")
    with squeeze.applied(t.model, {"method": "mixed", "steps": MIXED}) as handle:
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1))
        assert [cut.layer for cut in handle.cuts] == [1]
        told = handle.report().record.idle
    assert [sentence.split(" (")[0] for sentence in told] == ["recipe step 1", "recipe step 2"]
    assert all(sentence.endswith("it reduces video tokens, and this model takes none") for sentence in told)


def test_a_model_of_which_no_step_takes_anything_is_refused() -> None:
    with pytest.raises(squeeze.SqueezeError, match="reduces video tokens; 'llava' takes image"):
        squeeze.apply(tiny.load("llava").model, {"method": "mixed", "steps": MIXED[:2]})


def test_the_facts_are_what_the_steps_reduce_together() -> None:
    assert squeeze.describe({"method": "mixed", "steps": MIXED})["facts"]["modalities"] == ["image", "video"]
    both = MIXED[1] | {"modality": ["image", "video"]}
    assert squeeze.describe({"method": "mixed", "steps": [both]})["facts"]["modalities"] == ["image", "video"]


@pytest.mark.parametrize("change", [{"at": "projector"}, {"ratio": 0.25}])
def test_steps_that_meet_keep_order_and_budgets(change: dict[str, Any]) -> None:
    """The last step is fine for pictures, and goes back, or leaves more than is there, for clips."""
    last = {"at": {"layer": 2}, "ratio": 0.75, "select": "stride"} | change
    squeeze.describe({"method": "mixed", "steps": [*MIXED[:2], last | {"modality": "image"}]})
    with pytest.raises(squeeze.ConfigError, match="ascending order|no more than an earlier one"):
        squeeze.describe({"method": "mixed", "steps": [*MIXED[:2], last | {"modality": ["image", "video"]}]})


def test_a_modality_that_the_rule_cannot_reduce_is_refused() -> None:
    step = {"reducer": "temporal_windows", "at": "projector", "ratio": 0.5, "modality": "image"}
    with pytest.raises(squeeze.ConfigError, match="reduces video tokens, so modality: image leaves it none"):
        squeeze.describe({"method": "mixed", "steps": [step]})


def test_separators_of_a_clip_are_dropped_behind_a_cut_of_pictures() -> None:
    t = tiny.load("llava_onevision")
    steps = [MIXED[2] | {"ratio": 0.5}, MIXED[1] | {"separators": "drop"}]
    with registered(steps) as name:
        squeeze_and_prove(t, t.inputs["image_video"], name)
    length, stays = left(t, "image_video", steps)["video"]
    assert stays == int(length * 0.25 + 0.5)


def test_a_rule_is_told_the_cells_of_a_picture_behind_a_cut_of_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Separators that go anyway are nothing to choose from, whatever was cut of other spans before."""
    t, told = tiny.load("llava_onevision"), []
    count = Pipeline.count

    def noted(self: Pipeline, current: int, *rest: Any) -> int:
        told.append(current)
        return count(self, current, *rest)

    monkeypatch.setattr(Pipeline, "count", noted)
    clip = {"at": "projector", "ratio": 0.5, "modality": "video", "select": "stride"}
    picture = STEPS[0] | {"separators": "drop"}
    length, _ = left(t, "image_video", [picture])["image"]
    alone = told[-1]
    left(t, "image_video", [clip, picture])
    assert told[-1] == alone < length


def test_merging_in_the_encoder_leaves_what_its_step_does_not_name() -> None:
    t = tiny.load("llava_onevision")
    merge = {"at": {"encoder": "all"}, "ratio": 0.5, "merge": "bipartite"}
    with squeeze.applied(t.model, {"method": "mixed", "steps": [merge]}) as handle, torch.no_grad():
        t.model(**t.inputs["image"])
        assert handle.cuts
    dense = oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1)).prefill
    with squeeze.applied(t.model, {"method": "mixed", "steps": [merge | {"modality": "video"}]}) as handle:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", squeeze.SqueezeWarning)
            assert torch.equal(oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1)).prefill, dense)
        assert handle.cuts == ()


def test_the_recipe_of_the_page_runs_on_both() -> None:
    t = tiny.load("qwen2_5_vl")
    path = Path(__file__).parents[2] / "examples" / "pictures_and_clips.yaml"
    with squeeze.applied(t.model, path) as handle:
        oracle.run(t.model, t.inputs["image_video"], oracle.forced_tokens(1, 1))
        (image, video) = sorted(handle.layout.spans, key=lambda span: span.modality)
        kept = set(handle.cuts[-1].kept[0].tolist())
    assert len(kept & set(image.columns)) == int(image.length * 0.5 + 0.5)
    assert len(kept & set(video.columns)) == int(video.length * 0.125 + 0.5)
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").strip() in page


@pytest.mark.parametrize("modality", ["video", "image"])
def test_a_step_that_acts_while_decoding_leaves_other_modalities_alone(modality: str) -> None:
    t = tiny.load("qwen2_5_vl")
    seen: list[torch.Tensor] = []
    original = DecodeRefresh.refresh

    def look(self: Any, row: Any, previous: Any, kept: Any, mask: torch.Tensor) -> Any:
        seen.append(mask)
        return original(self, row, previous, kept, mask)

    steps = [
        {"at": "projector", "ratio": 0.5, "modality": "video", "select": "stride"},
        {"reducer": "decode_refresh", "at": {"cache": "decode"}, "layer": 1, "modality": modality},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeRefresh, "refresh", look)
        with squeeze.applied(t.model, {"method": "mixed", "steps": steps}) as handle:
            oracle.run(t.model, t.inputs["image_video"], oracle.forced_tokens(1, 2))
            columns = {span.modality: set(span.columns) for span in handle.layout.spans}
            kept = handle.cuts[-1].kept[0].tolist()
    visual = {kept[place] for place in seen[0][0].nonzero().flatten().tolist()}
    assert visual == columns[modality] & set(kept) != set()
