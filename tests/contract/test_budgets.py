"""Budgets of a whole prompt and of each row of a batch: to the token, exact, and the same alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError, SqueezeWarning

FAMILIES = ("llava", "qwen2_5_vl")
# At the projector, at one layer by attention, at several layers.
METHODS: dict[str, dict[str, Any]] = {"divprune": {}, "fastv": {"layer": 2}, "pyramiddrop": {}}
STEPS = 4
each_family = pytest.mark.parametrize("family", FAMILIES)
each_method = pytest.mark.parametrize("method", METHODS)


def left(handle: Any) -> list[int]:
    """Return the tokens of each span that are left in the end."""
    cut = handle.cuts[-1]
    return [len(set(cut.kept[span.sample].tolist()) & set(span.columns)) for span in handle.layout.spans]


def lengths(handle: Any, sample: int = 0) -> list[int]:
    return [span.length for span in handle.layout.spans if span.sample == sample]


@pytest.fixture
def applied(method: str) -> Callable[..., Any]:
    def apply(model: Any, **amount: Any) -> Any:
        return squeeze.applied(model, method, **METHODS[method], **amount)

    return apply


@each_family
@each_method
def test_two_pictures_share_a_total(family: str, method: str, applied: Any) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, STEPS)
    with applied(t.model, total=7) as handle:
        squeezed = oracle.run(t.model, inputs, forced)
        cuts, sizes, repack = handle.cuts, lengths(handle), matrix.repacks(handle)
        assert len(sizes) == 2
        assert sum(left(handle)) == 7
        assert left(handle) == list(ops.share_counts(7, sizes))
        assert [stage.asked for stage in handle.report().record.stages][-1] == tuple(left(handle))
    assert len(cuts) == (3 if method == "pyramiddrop" else 1)
    masked = oracle.masked_logits(t.model, inputs, cuts, forced, repack=repack)
    oracle.assert_steps(squeezed, masked, inputs, cuts, "total")


@pytest.mark.filterwarnings("ignore::mllm_squeeze.errors.SqueezeWarning")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "amount", [{"total": 7}, {"ratio": [0.2, 0.9, 0.5]}, {"keep": [3, 0.5, 64]}, {"total": [9, 2, 1]}], ids=str
)
@each_family
@each_method
def test_a_row_of_a_padded_batch_is_what_it_is_alone(
    family: str, method: str, applied: Any, amount: dict[str, Any], side: str
) -> None:
    t = tiny.load(family)
    batch, forced = t.batch(("two_images", "image", "text"), side), oracle.forced_tokens(3, STEPS)
    ((name, value),) = amount.items()
    with applied(t.model, **amount) as handle:
        joint = oracle.run(t.model, batch.inputs, forced)
        cuts, kept, repack = handle.cuts, left(handle), matrix.repacks(handle)
    alone: list[int] = []
    for b, single in enumerate(batch.singles):
        with applied(t.model, **{name: value[b] if isinstance(value, list) else value}) as handle:
            expected = oracle.run(t.model, single, forced[b : b + 1])
            alone += left(handle) if handle.layout is not None else []
        here = slice(batch.offsets[b], batch.offsets[b] + single["input_ids"].shape[1])
        oracle.assert_close(joint.prefill[b : b + 1, here], expected.prefill, f"row {b} prefill")
        oracle.assert_close(joint.decode[b : b + 1], expected.decode, f"row {b} decode")
    assert kept == alone
    masked = oracle.masked_logits(t.model, batch.inputs, cuts, forced, repack=repack)
    oracle.assert_steps(joint, masked, batch.inputs, cuts, "rows")


@each_family
@pytest.mark.parametrize("method", ["fastv"])
def test_beams_take_the_number_of_their_prompt(family: str, applied: Any) -> None:
    t = tiny.load(family)
    batch = t.batch(matrix.BEAM_BATCH if matrix.RECENT else ("image", "image"), "left")
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    with torch.no_grad():
        with applied(t.model, ratio=[0.3, 0.9]) as handle:
            joint = t.model.generate(**batch.inputs, **settings).sequences_scores
            kept = {span.sample: n for span, n in zip(handle.layout.spans, left(handle), strict=True)}
            whole = {span.sample: span.length for span in handle.layout.spans}
        scores = []
        for single, ratio in zip(batch.singles, (0.3, 0.9), strict=True):
            with applied(t.model, ratio=ratio):
                scores.append(t.model.generate(**single, **settings).sequences_scores)
    assert handle.layout.batch == 4
    for sample, count in kept.items():
        assert (count > whole[sample] // 2) == (sample < 2)
    oracle.assert_close(joint, torch.cat(scores), "scores of beams")


@pytest.mark.parametrize("method", ["fastv"])
def test_a_batch_of_another_size_says_so_and_harms_nothing(applied: Any) -> None:
    t = tiny.load("llava")
    batch, single = t.batch(("image", "image")), t.inputs["image"]
    dense = oracle.run(t.model, batch.inputs, oracle.forced_tokens(2, 1))
    with applied(t.model, ratio=[0.5, 0.9]) as handle:
        for inputs, rows in ((t.batch(("image",) * 4).inputs, 4), (single, 1)):
            with pytest.raises(ConfigError, match=rf"ratio=\[0.5, 0.9\] has 2 numbers, and the batch has {rows} row"):
                oracle.run(t.model, inputs, oracle.forced_tokens(rows, 0))
        with pytest.raises(ConfigError, match="has 2 numbers, and the batch has 1 row"):
            t.model.generate(**single, max_new_tokens=2, num_beams=2)
        oracle.run(t.model, batch.inputs, oracle.forced_tokens(2, 1))
        assert len(handle.cuts) == 1
    again = oracle.run(t.model, batch.inputs, oracle.forced_tokens(2, 1))
    assert torch.equal(dense.prefill, again.prefill) and torch.equal(dense.decode, again.decode)


@pytest.mark.parametrize("method", ["divprune"])
def test_a_total_that_is_too_little_or_too_much(applied: Any) -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, 1)
    with applied(t.model, total=1), pytest.raises(ConfigError, match="total=1 is less than .* 2 images.*at least 2"):
        oracle.run(t.model, inputs, forced)
    dense = oracle.run(t.model, inputs, forced)
    says = "asked to keep 999 tokens of a prompt whose spans have 50 together"
    with applied(t.model, total=999), pytest.warns(SqueezeWarning, match=says) as found:
        squeezed = oracle.run(t.model, inputs, forced)
    assert len(found) == 1
    assert torch.equal(dense.prefill, squeezed.prefill)


@pytest.mark.parametrize("amount", [{"total": 9}, {"keep": [3, 4]}], ids=str)
def test_inside_the_encoder_pictures_have_no_prompt(amount: dict[str, Any]) -> None:
    t = tiny.load("llava")
    with pytest.raises(ConfigError, match="speaks of prompts, and the encoder sees all pictures of a batch at once"):
        squeeze.apply(t.model, "tome", **amount)
    with pytest.raises(squeeze.NotAppliedError):
        squeeze.remove(t.model)


def test_the_report_says_what_was_asked_where_a_rule_leaves_another_number() -> None:
    t = tiny.load("llava")
    with squeeze.applied(t.model, "avgpool", keep=11) as handle:
        oracle.run(t.model, t.inputs["two_images"], oracle.forced_tokens(1, 0))
        report = handle.report()
        ((asked, kept),) = [(stage.asked, stage.after) for stage in report.record.stages]
    assert asked == (11, 11) and kept != asked
    assert squeeze.describe("avgpool")["facts"]["exact"] is False
    assert squeeze.describe("divprune")["facts"]["exact"] is True
    row = next(line for line in str(report).splitlines() if line.strip().startswith("0 ") and "image" in line)
    assert row.split()[-1] == "11"


@pytest.mark.parametrize(("family", "kind"), [("mllama", "two_images"), ("llava_onevision", "image_video")])
def test_a_total_of_keys_and_of_pictures_beside_a_film(family: str, kind: str) -> None:
    t = tiny.load(family)
    with squeeze.applied(t.model, "divprune", total=11) as handle, torch.no_grad():
        t.model(**t.inputs[kind])
        (stage,) = handle.report().record.stages
        assert sum(stage.after) == 11 and stage.after == stage.asked == ops.share_counts(11, lengths(handle))


@pytest.mark.parametrize("amount", [{"total": 5}, {"keep": 5}, {"keep": [5]}], ids=str)
def test_a_film_alone_has_what_a_rule_for_films_is_given(amount: dict[str, Any]) -> None:
    """The picture beside it is not reduced, and not counted."""
    t = tiny.load("llava_onevision")
    steps = [{"reducer": "temporal_windows", "at": "projector", "separators": "keep", **amount}]
    with squeeze.applied(t.model, {"method": "films", "steps": steps}) as handle, torch.no_grad():
        with pytest.raises(
            ConfigError,
            match="'films' with .*=.*5.* may leave 5 of the .*less than the 8 that stay.*4th after it stay whole",
        ):
            t.model(**t.inputs["image_video"])
        assert handle.cuts == ()


def test_a_schedule_of_fractions_beside_a_later_total() -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, STEPS)
    rule = {"score": "random"}
    steps = [
        {**rule, "at": {"layers": [0, 1]}, "kept": [0.8, 0.5]},
        {**rule, "at": {"layer": 2}, "total": 9},
        {**rule, "at": {"layer": 3}, "keep": [4]},
    ]
    with squeeze.applied(t.model, {"method": "mixed", "steps": steps}) as handle:
        squeezed = oracle.run(t.model, inputs, forced)
        cuts = handle.cuts
        after = [stage.after for stage in handle.report().record.stages]
    assert after == [(20, 20), (13, 13), (5, 4), (4, 4)]
    oracle.assert_steps(squeezed, oracle.masked_logits(t.model, inputs, cuts, forced), inputs, cuts, "mixed")


def test_cuts_that_fall_on_one_layer_are_one() -> None:
    """A model of few layers has as much removed as one of many: the last of those that meet says what is left."""
    t = tiny.load("llava")
    for variant in ("paper", "official"):
        with squeeze.applied(t.model, "ficoco_l", variant=variant) as handle, torch.no_grad():
            t.model(**t.inputs["image"])
            layers, left = [cut.layer for cut in handle.cuts], handle.report().as_dict()
            number = handle.layout.spans[0].length
            kept = [len(set(cut.kept[0].tolist()) & set(handle.layout.spans[0].columns)) for cut in handle.cuts]
        assert layers == sorted(set(layers)) and len(layers) > 1, left
        assert kept == sorted(kept, reverse=True)
        assert kept[-1] == ops.kept_count(number, keep=0.3681)
