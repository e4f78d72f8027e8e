"""BLIP-2 and InstructBLIP: steps at `keys` reduce the image features that the Q-Former's queries attend to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import keyed, proof
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need
from mllm_squeeze.registry import unregister_reducer

pytestmark = pytest.mark.quick
FAMILIES = ("blip_2", "instructblip")
KINDS = ("image", "two_images")
# Reducers that look at the features alone, and whether they merge.
REDUCERS = {"farthest_point": False, "pool": True, "random": False, "even_sample": False}
KINDS_OF_PARTS = {"farthest_point": "select", "pool": "merge", "random": "score", "even_sample": "select"}
# Features of an image: a CLS token and 4x4 patches.
KEYS = 17


def recipe(reducer: str = "farthest_point", at: Any = "keys", **options: Any) -> dict[str, Any]:
    rule = {KINDS_OF_PARTS.get(reducer, "reducer"): reducer}
    return {"method": "mine", "steps": [{**rule, "at": at, **({"ratio": 0.5} | options)}]}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_zero_is_bit_equal(family: str, reducer: str) -> None:
    t, forced = tiny.load(family), oracle.forced_tokens(1, 2)
    inputs = t.inputs["image"]
    dense, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
    with squeeze.applied(t.model, recipe(reducer, ratio=0)) as handle:
        assert torch.equal(proof.forward(t, inputs), dense)
        assert torch.equal(proof.generate(t, inputs, forced), steps)
        assert handle.cuts == ()


def prove(t: tiny.TinyModel, inputs: tiny.Inputs, method: Any, merges: bool = False) -> Any:
    """Compare forward and generate() with the dense model whose Q-Former masks what was dropped."""
    forced = oracle.forced_tokens(len(inputs["input_ids"]), proof.STEPS)
    seen: list[dict[str, Tensor]] = []

    def look(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append({k: v for k, v in kwargs.items() if k.startswith("encoder_")})

    dense = proof.forward(t, inputs)
    with squeeze.applied(t.model, method) as handle:
        hook = t.model.qformer.register_forward_pre_hook(look, with_kwargs=True)
        logits = proof.forward(t, inputs)
        hook.remove()
        cuts = handle.cuts
        decode = proof.generate(t, inputs, forced)
    kept = cuts[-1].kept
    short = seen[0]["encoder_hidden_states"]
    assert seen[0]["encoder_attention_mask"].shape == short.shape[:2]
    assert seen[0]["encoder_attention_mask"].sum(1).tolist() == [len(row) for row in kept]
    assert short.shape[1] == max(map(len, kept)) < KEYS
    merged = None
    if merges:
        hook = t.model.qformer.register_forward_pre_hook(look, with_kwargs=True)
        proof.forward(t, inputs)
        hook.remove()
        merged = keyed.spread(short, kept, seen[-1]["encoder_hidden_states"])
    with keyed.masked_queries(t.model, kept, merged):
        oracle.assert_close(logits, proof.forward(t, inputs), "forward")
        oracle.assert_close(decode, proof.generate(t, inputs, forced), "generate")
    assert oracle.gap(logits, dense) > 1e-3, "the cut does not matter"
    return handle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_is_what_masking_is(family: str, reducer: str, kind: str, covers: Any) -> None:
    covers(family, "keys")
    t = tiny.load(family)
    handle = prove(t, t.inputs[kind], recipe(reducer), REDUCERS[reducer])
    images = len(t.inputs[kind]["pixel_values"])
    assert [(s.sample, s.length) for s in handle.layout.spans] == [(n, KEYS) for n in range(images)]
    assert handle.layout.keys
    if reducer != "pool":
        assert [len(row) for row in handle.cuts[0].kept] == [proof.expected_count(KEYS, 0.5)] * images


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch(family: str) -> None:
    t = tiny.load(family)
    prove(t, t.batch(KINDS).inputs, recipe())


class Uneven(Reducer):
    """Keeps one token more of each image than of the one before."""

    places = frozenset({"projector"})
    known_count = False

    def reduce(self, tokens: VisualTokens) -> Reduction:
        rows, width = tokens.mask.shape
        return Reduction(keep=tokens.mask & (torch.arange(width) <= torch.arange(rows)[:, None]))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_that_keep_different_numbers(family: str) -> None:
    t = tiny.load(family)
    squeeze.register_reducer("uneven", Uneven)
    try:
        handle = prove(t, t.inputs["two_images"], recipe("uneven"))
    finally:
        unregister_reducer("uneven")
    assert [row.tolist() for row in handle.cuts[0].kept] == [[0], [0, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family: str) -> None:
    t = tiny.load(family)
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "return_dict_in_generate": True}
    with squeeze.applied(t.model, recipe()) as handle:
        found = t.model.generate(**t.inputs["image"], **settings, output_logits=True)
    with keyed.masked_queries(t.model, handle.cuts[0].kept):
        expected = t.model.generate(**t.inputs["image"], **settings, output_logits=True)
    assert torch.equal(found.sequences, expected.sequences)
    oracle.assert_close(torch.stack(found.logits), torch.stack(expected.logits), "all beams")


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_front_of_the_llm_cut_the_queries(family: str) -> None:
    """What the projector means has not changed: the features as the LLM gets them, which are the queries."""
    t = tiny.load(family)
    with squeeze.applied(t.model, recipe(at="projector")) as handle:
        proof.forward(t, t.inputs["image"])
        assert not handle.layout.keys
        assert handle.layout.length == t.inputs["image"]["input_ids"].shape[1]
        assert handle.report().visual_before == int(t.visual(t.inputs["image"]).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_speaks_of_the_q_former(family: str) -> None:
    """No cost of the language model is told, as it is what it was."""
    t = tiny.load(family)
    with squeeze.applied(t.model, recipe()) as handle:
        proof.forward(t, t.inputs["two_images"])
    report = handle.report()
    assert report.span_tokens == ((17, 17), (9, 9))
    assert report.flops is report.flops_dense is report.cache_bytes is report.cache_bytes_dense is None
    assert report.visual_per_layer == ()
    said = str(report)
    assert "in front of the Q-Former" in said
    assert "17 -> 9" in said
    assert "language model" not in said and "tokens in decoder layers" not in said


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_put_back(family: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, 1)
    dense, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
    before = snapshot.snapshot(t.model)
    with squeeze.applied(t.model, recipe()) as handle:
        assert not torch.equal(proof.forward(t, inputs), dense)
        with handle.disabled():
            assert torch.equal(proof.forward(t, inputs), dense)
        with pytest.raises(squeeze.SqueezeError, match="copy or a pickle of it would carry its hooks"):
            copy.deepcopy(t.model)
        with pytest.raises(squeeze.SqueezeError, match="copy or a pickle of it would carry its hooks"):
            copy.deepcopy(t.model.qformer)
        with pytest.raises(RuntimeError), torch.no_grad():
            t.model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :2]})
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    assert torch.equal(proof.forward(t, inputs), dense)
    assert torch.equal(proof.generate(t, inputs, forced), steps)


# Refusals


def test_keys_of_the_q_former_and_its_queries_in_one_recipe() -> None:
    both = {"method": "both", "steps": [*recipe()["steps"], *recipe(at={"layer": 2})["steps"]]}
    with pytest.raises(ConfigError, match="keys of the Q-Former and at layer 2.*two recipes"):
        squeeze.apply(tiny.load("blip_2").model, both)


def test_what_reads_more_than_the_features() -> None:
    steps = [{**step.options, "at": "keys", "ratio": 0.5} for step in load_recipe("visionzip").steps]
    with pytest.raises(UnsupportedModelError, match="reads the attention of the vision encoder and the keys"):
        squeeze.apply(tiny.load("blip_2").model, {"method": "mine", "steps": steps})


class ReadsWords(Uneven):
    """Says that it reads the words of the prompt."""

    def needs(self) -> tuple[Need, ...]:
        return (Features(), Features("text"))


def test_what_reads_the_words() -> None:
    squeeze.register_reducer("reads_words", ReadsWords)
    try:
        with pytest.raises(UnsupportedModelError, match="reads the words of the prompt"):
            squeeze.apply(tiny.load("instructblip").model, recipe("reads_words"))
    finally:
        unregister_reducer("reads_words")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_where_nothing_attends_from_outside(family: str) -> None:
    t = tiny.load(family)
    before = snapshot.snapshot(t.model)
    with pytest.raises(UnsupportedModelError, match=r"acts on keys.*Write at: projector"):
        squeeze.apply(t.model, recipe())
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("amount", [{"total": 9}, {"ratio": [0.5, 0.9]}], ids=str)
def test_pictures_in_front_of_a_q_former_have_no_prompt(amount: dict[str, Any]) -> None:
    t = tiny.load("blip_2")
    method = recipe() | {"steps": [{"select": "farthest_point", "at": "keys", **amount}]}
    with pytest.raises(ConfigError, match="step 1: .* speaks of prompts, and what the Q-Former attends to are"):
        squeeze.apply(t.model, method)
