"""The recipes that ship say what their papers say and what the reducers understand."""

from __future__ import annotations

import pytest

from mllm_squeeze import registry
from mllm_squeeze.amount import Amount
from mllm_squeeze.ops import kept_count
from mllm_squeeze.recipe.build import PIPELINE, build_reducer
from mllm_squeeze.recipe.recipe import describe, load_recipe

# method: (tokens of 576 kept by default, None without one ratio, where, positions, reads the text, known count)
TABLE = {
    "a_tome": (346, ["projector"], "keep", False, False),
    "adaptinfer": (None, ["layers 0.0625, 0.34375, 0.65625"], "repack", True, True),
    "adatp": (None, ["layers 0.0714, 0.357, 0.643"], "keep", True, True),
    "aim": (
        None,
        ["projector", "layers 0.5357, 0.5714, 0.6071, 0.6429, 0.6786, 0.7143, 0.75, 0.7857"],
        "keep",
        True,
        False,
    ),
    "avgpool": (144, ["projector"], "repack", False, True),
    "bilinear": (144, ["projector"], "repack", False, True),
    "btp": (48, ["layer 0.09375", "layer 0.1875", "layer 0.4375"], "keep", True, True),
    "cdpruner": (64, ["projector"], "repack", True, True),
    "corematching": (None, ["layer 0.1875"], "keep", True, False),
    "dart": (128, ["layer 2"], "keep", True, True),
    "deco": (144, ["projector"], "repack", False, True),
    "divprune": (56, ["projector"], "repack", False, True),
    "dycoke": (274, ["projector", "cache decode"], "repack", True, True),
    "dyntok": (None, ["projector"], "repack", False, False),
    "dytok": (144, ["layer 0.5"], "repack", True, True),
    "egoprune": (288, ["projector", "layer 0"], "keep", True, False),
    "evs": (144, ["projector"], "keep", False, True),
    "fastadasp": (288, ["layer 3"], "keep", True, True),
    "fastervlm": (58, ["projector"], "repack", False, True),
    "fastvid": (None, ["projector"], "keep", False, False),
    "fastv": (288, ["layer 2"], "keep", True, True),
    "ficoco_l": (None, [f"layers {', '.join(f'{n / 32:g}' for n in range(6, 32))}"], "repack", True, True),
    "flashvid": (54, ["projector", "layer 0.714"], "repack", True, False),
    "framefusion": (None, ["layers 0.0357, 0.0714, 0.1071, 0.1429, 0.1786, 0.2143", "layer 0.25"], "keep", True, False),
    "fourier_vlm": (144, ["projector"], "repack", False, True),
    "hawk": (115, ["layer 0"], "keep", True, True),
    "hiprune": (64, ["projector"], "repack", False, True),
    "hired": (115, ["projector"], "repack", False, False),
    "holitom": (72, ["projector", "layer 0.643"], "repack", True, False),
    "ivc_prune": (288, ["layer 0.5"], "keep", True, True),
    "kvtp": (115, ["projector"], "repack", True, True),
    "llava_scissor": (None, ["projector"], "repack", False, False),
    "longvu": (144, ["projector"], "repack", True, False),
    "m3": (144, ["projector"], "repack", False, True),
    "metok": (144, ["projector", "layers 0.25, 0.5"], "keep", True, False),
    "mob": (64, ["layer 2"], "keep", True, True),
    "mustdrop": (None, ["projector", "layers 0.09375, 0.21875, 0.34375, 0.46875"], "repack", True, False),
    "nuwa": (16, ["projector", "layer 0.5"], "keep", True, True),
    "omnizip": (None, ["projector"], "keep", False, False),
    "otprune": (56, ["projector"], "repack", False, True),
    "pact": (None, ["layer 4"], "keep", True, False),
    "priortr": (192, ["layer 3"], "keep", True, True),
    "prumerge": (None, ["projector"], "repack", False, False),
    "prumerge_plus": (None, ["projector"], "repack", False, False),
    "prunesid": (64, ["projector"], "repack", False, True),
    "prunevid": (None, ["projector", "layer 0.344"], "repack", True, False),
    "pyramiddrop": (72, ["layers 0.25, 0.5, 0.75"], "repack", True, True),
    "random": (288, ["layer 0"], "keep", False, True),
    "recoverable_compression": (None, ["projector"], "repack", True, False),
    "scope": (64, ["projector"], "repack", False, True),
    "score_kcenter": (64, ["projector"], "repack", False, True),
    "sparsevlm": (109, ["layers 0.09375, 0.21875, 0.5"], "repack", True, True),
    "sparsevlm2": (118, ["layers 0.09375, 0.21875, 0.5"], "keep", True, True),
    "sttm": (None, ["layer 2"], "repack", False, False),
    "timechat_online": (None, ["projector"], "keep", False, False),
    "tokencarve": (128, ["layer 2"], "keep", True, True),
    "tome": (207, ["encoder all"], "repack", False, True),
    "topv": (288, ["layer 3"], "keep", False, True),
    "transprune": (72, ["layer 0.21875", "layer 0.28125", "layer 0.375"], "repack", True, True),
    "trim": (None, ["projector"], "repack", True, False),
    "uniform": (288, ["layer 0"], "keep", False, True),
    "v2drop": (None, ["layers 0.09375, 0.53125, 0.6875"], "keep", False, True),
    "vflowopt": (132, ["projector", "layer 0.322", "layer 0.643"], "repack", False, False),
    "vidcom2": (144, ["projector"], "repack", False, False),
    "visiontrim": (64, ["projector"], "repack", True, True),
    "visionzip": (64, ["projector"], "repack", False, True),
    "vispruner": (64, ["projector"], "repack", False, True),
    "vscan": (32, ["projector", "layer 0.5"], "repack", True, True),
    "zoo_prune": (64, ["projector"], "repack", False, True),
}


def test_the_table_is_complete():
    assert sorted(path.stem for path in registry.configs_dir().glob("*.yaml")) == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_recipe(name):
    kept, places, positions, reads_text, known = TABLE[name]
    recipe, facts = load_recipe(name), describe(name)["facts"]
    assert recipe.method == name
    ratio = recipe.params.get("ratio")
    assert (None if ratio is None else kept_count(576, ratio)) == kept
    assert recipe.positions == positions
    assert facts["places"] == places
    assert (facts["reads_text"], facts["known_count"]) == (reads_text, known)
    assert (recipe.paper is None) == (name in ("random", "uniform", "avgpool", "bilinear"))
    assert recipe.summary.endswith(".")


@pytest.mark.parametrize("name", TABLE)
def test_every_parameter_of_a_recipe_is_used(name):
    raw = load_recipe(name).raw
    text = str([raw["steps"], raw.get("variants")])
    used = {param for param in raw["params"] if f"${{{param}}}" in text}
    assert used | ({"variant"} if "variants" in raw else set()) == set(raw["params"])


@pytest.mark.parametrize("name", TABLE)
def test_every_variant_loads_and_is_another(name):
    for word in load_recipe(name).variants:
        recipe = load_recipe(name, variant=word)
        assert recipe.params["variant"] == word
        others = [load_recipe(name, variant=other) for other in recipe.variants if other != word]
        assert all([s.options for s in recipe.steps] != [s.options for s in other.steps] for other in others)


@pytest.mark.parametrize("name", TABLE)
def test_every_method_documents_its_paper_and_its_differences(name):
    recipe = load_recipe(name)
    text = (registry.configs_dir() / f"{name}.yaml").read_text()
    for step in recipe.steps:
        doc = (type(build_reducer(step)).__doc__ or "") if step.reducer != PIPELINE else text
        if recipe.paper is not None:
            assert recipe.paper.arxiv is None or recipe.paper.arxiv in doc
            assert "Differs from the authors' code" in doc


def test_keep_replaces_the_ratio():
    for name in TABLE:
        assert Amount(keep=64) in [step.amount for step in load_recipe(name, keep=64).steps]
