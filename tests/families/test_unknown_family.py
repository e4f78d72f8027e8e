"""A family that is not in the table: tried, proved on its first call, or refused; and families of other packages."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
import transformers

import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import proof
from mllm_squeeze import api, plugins, registry
from mllm_squeeze.family.table import TABLE, FamilyRow

pytestmark = pytest.mark.quick
# What a third party's package would offer as an entry point.
OFFERED = FamilyRow("house_llava", tower_to_llm="identity", cls=True, per_token=True, note="From another package.")


class HouseConfig(transformers.LlavaConfig):
    """A config that no row knows."""

    model_type = "house_llava"


class HouseModel(transformers.LlavaForConditionalGeneration):
    """A LLaVA of somebody's own."""

    config_class = HouseConfig


@pytest.fixture
def house() -> tiny.TinyModel:
    """Return a tiny LLaVA whose class and model_type are somebody's own."""
    t = tiny.fresh("llava")
    model = HouseModel(HouseConfig(**{k: v for k, v in t.model.config.to_dict().items() if k != "model_type"}))
    model.load_state_dict(t.model.state_dict())
    model.generation_config = t.model.generation_config
    return tiny.TinyModel("house_llava", model.eval(), t.inputs, t.family)


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Take rows out of the table."""
    for name in names:
        monkeypatch.delitem(TABLE, name)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a package offer a family."""
    point = EntryPoint("house_llava", f"{__name__}:OFFERED", registry.FAMILIES_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: OFFERED)
    real = plugins.points

    def points(group: str) -> dict[str, list[EntryPoint]]:
        return {"house_llava": [point]} if group == registry.FAMILIES_GROUP else real(group)

    monkeypatch.setattr(plugins, "points", points)


def test_a_class_of_ones_own_works_after_its_self_check(house: tiny.TinyModel) -> None:
    """The first call proves a cut; the squeezed model then says what the known family says."""
    assert squeeze.check(house.model)["verified"] is False
    known, forced = tiny.load("llava"), oracle.forced_tokens(1, 2)
    before = snapshot.snapshot(house.model)
    for method, params in (("divprune", {"ratio": 0.5}), ("fastv", {"ratio": 0.5, "layer": 2})):
        with squeeze.applied(known.model, method, **params) as handle:
            expected, cuts = proof.generate(known, known.inputs["image"], forced), handle.cuts
        with squeeze.applied(house.model, method, **params) as handle:
            assert torch.equal(proof.generate(house, house.inputs["image"], forced), expected)
            assert [c.kept[0].tolist() for c in handle.cuts] == [c.kept[0].tolist() for c in cuts]
            # The second call is not checked again.
            calls = count_calls(oracle.text_model(house.model), lambda: proof.forward(house, house.inputs["image"]))
            assert calls == 1
    snapshot.assert_same(before, snapshot.snapshot(house.model))


def count_calls(module: Any, run: Any) -> int:
    """Return how often a module is called."""
    calls = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run()
    finally:
        hook.remove()
    return len(calls)


def test_the_first_call_is_checked(house: tiny.TinyModel) -> None:
    with squeeze.applied(house.model, "divprune", ratio=0.5):
        calls = count_calls(oracle.text_model(house.model), lambda: proof.forward(house, house.inputs["image"]))
    assert calls == 3, "the cut, the mask, and the call itself"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "gemma3", "lighton_ocr", "cohere2_vision", "idefics3"])
def test_known_models_work_without_their_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiny.available(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    without(monkeypatch, tiny.load(family).model.config.model_type)
    assert squeeze.check(tiny.load(family).model)["verified"] is False
    proof.squeeze_and_prove(tiny.load(family), "image", "fastv")


def test_what_is_not_exact_is_refused(house: tiny.TinyModel) -> None:
    """A text model whose layers look at the places of the sequence they get: a cut is not what masking is."""
    before = snapshot.snapshot(house.model)
    counting = add_places(oracle.text_model(house.model).layers[3])
    try:
        with squeeze.applied(house.model, "fastv", ratio=0.5, layer=2) as handle:
            with pytest.raises(squeeze.SqueezeError, match=r"docs/add_a_family\.md") as caught:
                proof.forward(house, house.inputs["image"])
            assert isinstance(caught.value, TypeError)
            assert not handle.cuts
    finally:
        counting.remove()
    assert "differs from masking" in str(caught.value)
    assert "'house_llava'" in str(caught.value)
    snapshot.assert_same(before, snapshot.snapshot(house.model))


def test_what_raises_when_it_is_cut_is_refused(house: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text model that insists on the length of the prompt: its own error is told, with where to go from there."""
    layer = oracle.text_model(house.model).layers[3]
    forward, length = layer.forward, house.inputs["image"]["input_ids"].shape[1]

    def stubborn(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden_states + torch.zeros(length, 1), *args, **kwargs)

    monkeypatch.setattr(layer, "forward", stubborn)
    before = snapshot.snapshot(house.model)
    with (
        squeeze.applied(house.model, "fastv", ratio=0.5, layer=2),
        pytest.raises(squeeze.SqueezeError, match=r"raises RuntimeError: The size .*docs/add_a_family\.md") as caught,
    ):
        proof.forward(house, house.inputs["image"])
    assert "'house_llava'" in str(caught.value) and isinstance(caught.value.__cause__, RuntimeError)
    snapshot.assert_same(before, snapshot.snapshot(house.model))


def add_places(layer: Any) -> Any:
    """Make a layer scale what it gets by the place of each token, as temperatures that grow with the place do."""

    def scale(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        places = torch.arange(args[0].shape[1], dtype=args[0].dtype)
        return (args[0] * (1 + 0.1 * places[None, :, None]), *args[1:]), kwargs

    return layer.register_forward_pre_hook(scale, with_kwargs=True)


@pytest.mark.parametrize("family", ["lfm2_vl", "qwen3_5"])
def test_layers_without_attention_cannot_be_checked(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masking a token means nothing to a recurrent layer, so such a family needs its row."""
    t = tiny.load(family)
    without(monkeypatch, t.model.config.model_type)
    before = snapshot.snapshot(t.model)
    with (
        squeeze.applied(t.model, "divprune", ratio=0.5),
        pytest.raises(squeeze.SqueezeError, match=r"mixes tokens without attention.*docs/add_a_family\.md"),
    ):
        proof.forward(t, t.inputs["image"])
    snapshot.assert_same(before, snapshot.snapshot(t.model))


def test_a_family_of_another_package(house: tiny.TinyModel, offered: None) -> None:
    """Its row is used: no self-check, and methods that read the tower fit."""
    assert "house_llava" in squeeze.families()
    found = squeeze.check(house.model)
    assert found["verified"] is True
    assert found["note"] == OFFERED.note
    assert found["methods"]["visionzip"] == "fits"
    with squeeze.applied(house.model, "visionzip", ratio=0.5):
        calls = count_calls(oracle.text_model(house.model), lambda: proof.forward(house, house.inputs["image"]))
    assert calls == 1


def test_without_the_package_the_tower_cannot_be_read(house: tiny.TinyModel) -> None:
    assert "house_llava" not in squeeze.families()
    assert "vision encoder" in squeeze.check(house.model)["methods"]["visionzip"]


def test_a_text_model_is_no_family() -> None:
    model = transformers.LlamaForCausalLM(tiny.load("llava").model.config.get_text_config())
    with pytest.raises(squeeze.SqueezeError, match="no multimodal family"):
        squeeze.apply(model, "fastv")


def test_a_row_of_the_table_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that says less makes methods that need more be refused."""
    monkeypatch.setitem(TABLE, "llava", replace(TABLE["llava"], tower_to_llm="none"))
    assert squeeze.check(tiny.load("llava").model)["methods"]["visionzip"] != "fits"
    assert "llava" in api.families()
