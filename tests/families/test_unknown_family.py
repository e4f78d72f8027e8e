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
# One that keeps tokens as they are, and one that merges the others into them.
ENCODER_READERS = ("fastervlm", "visionzip")
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


@pytest.mark.parametrize("kind", ["image", "two_images"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "gemma3", "lighton_ocr", "cohere2_vision", "idefics3"])
def test_encoders_are_read_without_their_rows(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the row says of the way to the LLM's tokens is found by experiment: the same tokens stay."""
    if not tiny.available(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    t = tiny.load(family)
    known = [logits_and_kept(t, kind, method) for method in ENCODER_READERS]
    without(monkeypatch, t.model.config.model_type)
    unknown = [logits_and_kept(t, kind, method) for method in ENCODER_READERS]
    for (before, kept), (after, same) in zip(known, unknown, strict=True):
        assert kept == same
        oracle.assert_close(after, before, "without the row")
    proof.squeeze_and_prove(t, kind, ENCODER_READERS[0])


def logits_and_kept(t: tiny.TinyModel, kind: str, method: str) -> tuple[torch.Tensor, list[list[bool]]]:
    with squeeze.applied(t.model, method, ratio=0.5) as handle:
        return proof.forward(t, t.inputs[kind]), [cut.kept[0].tolist() for cut in handle.cuts]


def test_a_class_of_ones_own_has_its_encoder_read(house: tiny.TinyModel) -> None:
    before = snapshot.snapshot(house.model)
    handle = proof.squeeze_and_prove(house, "two_images", ENCODER_READERS[0])
    assert handle.cuts and squeeze.check(house.model)["methods"]["visionzip"] == "fits"
    snapshot.assert_same(before, snapshot.snapshot(house.model))


class Folding(torch.nn.Module):
    """A projector that nobody has seen: the mean of 2x2 patches becomes a token, and the last one comes first."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        side = int(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side, side))[:, : side // 2 * 2, : side // 2 * 2]  # what is left over is dropped
        cells = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
        return self.inner(cells.flatten(1, 2).flip(1))


class Mixing(Folding):
    """One whose tokens look at all patches."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        folded = super().forward(patches)
        return folded + folded.mean(1, keepdim=True)


def folded(t: tiny.TinyModel) -> dict[str, torch.Tensor]:
    """Return a prompt with a placeholder for each four patches."""
    inputs = t.inputs["image"]
    visual = inputs["input_ids"] == t.model.config.image_token_id
    tokens = (int(visual.sum() ** 0.5) // 2) ** 2
    keep = (~visual | (visual.cumsum(1) <= tokens))[0]
    return {k: v[:, keep] if v.shape == visual.shape else v for k, v in inputs.items()}


def test_a_projector_that_nobody_has_seen(house: tiny.TinyModel) -> None:
    house.model.model.multi_modal_projector = Folding(house.model.model.multi_modal_projector)
    inputs = folded(house)
    mine = tiny.TinyModel("house_llava", house.model, {"image": inputs}, house.family)
    handle = proof.squeeze_and_prove(mine, "image", ENCODER_READERS[0])
    assert handle.report().visual_before == int((inputs["input_ids"] == house.model.config.image_token_id).sum())
    with squeeze.applied(house.model, mean_attention(), ratio=0.5) as handle:
        proof.forward(mine, inputs)
        kept = handle.cuts[-1].kept[0].tolist()
    assert kept == expected_of(house, inputs)


def mean_attention() -> dict[str, Any]:
    steps = [{"at": "projector", "ratio": "${ratio}", "score": {"encoder_attention": {"rows": "all", "block": 1}}}]
    return {"method": "mean_attention", "params": {"ratio": 0.5}, "steps": steps}


def expected_of(t: tiny.TinyModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Return the columns that stay by the attention in block 1 of the encoder, summed up by hand."""
    seen: list[torch.Tensor] = []
    before = t.model.config._attn_implementation
    t.model.set_attn_implementation("eager")
    attention = t.model.model.vision_tower.encoder.layers[1].self_attn
    hook = attention.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    try:
        with torch.no_grad():
            t.model(**inputs)
    finally:
        hook.remove()
        t.model.set_attn_implementation(before)
    received = seen[0].sum((0, 1, 2))[1:]  # without the CLS token
    side = int(len(received) ** 0.5)
    grid = received.unflatten(0, (side, side))[: side // 2 * 2, : side // 2 * 2]
    tokens = grid.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).mean((1, 3)).flatten().flip(0)
    columns = (inputs["input_ids"][0] == t.model.config.image_token_id).nonzero()[:, 0]
    best = tokens.argsort(descending=True, stable=True)[: round(len(tokens) / 2)]
    text = set(range(inputs["input_ids"].shape[1])) - set(columns.tolist())
    return sorted(text | set(columns[best].tolist()))


def test_a_projector_that_mixes_all_patches_is_refused(house: tiny.TinyModel) -> None:
    house.model.model.multi_modal_projector = Mixing(house.model.model.multi_modal_projector)
    inputs = folded(house)
    before = snapshot.snapshot(house.model)
    with (
        squeeze.applied(house.model, "visionzip", ratio=0.5),
        pytest.raises(squeeze.SqueezeError, match=r"goes into several tokens.*Use a method that reads nothing"),
    ):
        house.model(**inputs)
    snapshot.assert_same(before, snapshot.snapshot(house.model))


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


def test_without_the_package_nothing_merges_inside_the_tower(house: tiny.TinyModel) -> None:
    """An experiment finds the way from the tower to the LLM; only a row says that it may be shortened on the way."""
    assert "house_llava" not in squeeze.families()
    assert "vision encoder" in squeeze.check(house.model)["methods"]["tome"]


def test_a_text_model_is_no_family() -> None:
    model = transformers.LlamaForCausalLM(tiny.load("llava").model.config.get_text_config())
    with pytest.raises(squeeze.SqueezeError, match="no multimodal family"):
        squeeze.apply(model, "fastv")


def test_a_row_of_the_table_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that says less makes methods that need more be refused."""
    monkeypatch.setitem(TABLE, "llava", replace(TABLE["llava"], tower_to_llm="queries"))
    assert squeeze.check(tiny.load("llava").model)["methods"]["visionzip"] != "fits"
    assert "llava" in api.families()
