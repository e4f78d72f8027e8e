"""What docs/add_a_method.md promises: a recipe made of parts is one file, a new part one class and one registration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import matrix
import mllm_squeeze as squeeze
import tiny
from contract.test_equivalence import check_counts, check_cuts, squeeze_and_prove
from mllm_squeeze.errors import ConfigError, UnknownNameError
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.reducers.base import Signals, VisualTokens

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "add_a_method.md").read_text(encoding="utf-8")


def block(language: str, words: str) -> str:
    """Return the code block of the page that holds some words."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if words in code)
    return str(found)


@pytest.fixture
def one_file(tmp_path: Path) -> Iterator[str]:
    """Register the page's recipe, a file and nothing else."""
    path = tmp_path / "asked_twice.yaml"
    path.write_text(block("yaml", "method: asked_twice"))
    squeeze.register_method("asked_twice", path)
    yield "asked_twice"
    squeeze.unregister_method("asked_twice")


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_a_recipe_of_parts_runs_on_every_family_that_fits(family: str, one_file: str) -> None:
    t = tiny.load(family)
    if squeeze.check(t.model)["methods"][one_file] != "fits":
        with pytest.raises(squeeze.SqueezeError):
            squeeze.apply(t.model, one_file)
        return
    handle = squeeze_and_prove(t, t.inputs["image"], one_file)
    check_cuts(t, t.inputs["image"], handle)
    check_counts(handle, one_file)


def test_it_fits_most_families(one_file: str) -> None:
    fits = [name for name in matrix.FAMILIES if squeeze.check(tiny.load(name).model)["methods"][one_file] == "fits"]
    assert len(fits) >= len(matrix.FAMILIES) - 2, fits


@pytest.fixture
def centre() -> Iterator[Any]:
    """Register the page's part."""
    scope: dict[str, Any] = {"__name__": "my_parts.centre"}
    exec(block("python", "class Centre").replace("if TYPE_CHECKING:", "if True:"), scope)
    squeeze.register_part("centre", scope["Centre"])
    yield scope["Centre"]
    squeeze.unregister_part("score", "centre")


RECIPE = {
    "method": "centred",
    "params": {"ratio": 0.5},
    "steps": [{"at": {"layer": 1}, "ratio": "${ratio}", "score": {"centre": {"power": 1}}}],
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_new_part_is_one_class_and_one_registration(family: str, centre: Any) -> None:
    squeeze.register_method("centred", RECIPE)
    try:
        squeeze_and_prove(tiny.load(family), tiny.load(family).inputs["image"], "centred")
    finally:
        squeeze.unregister_method("centred")


def test_the_part_does_what_it_says(centre: Any) -> None:
    choice = squeeze.choose(RECIPE, grid=(3, 3), keep=5)
    assert choice.keep.view(3, 3).int().tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    tokens = VisualTokens(
        mask=torch.ones(1, 4, dtype=torch.bool),
        budget=torch.tensor([2]),
        counts=(2,),
        grid=torch.tensor([[[0, 0, 0, n] for n in range(4)]]),
        origin=torch.arange(4)[None],
        lengths=(4,),
        signals=Signals({}),
    )
    whole = Groups(torch.zeros(1, 4, dtype=torch.long), 1)
    assert centre(power=2).score(tokens, whole).tolist() == [[-1.5, -0.5, -0.5, -1.5]]


def test_what_a_stranger_mistypes(centre: Any) -> None:
    with pytest.raises(ConfigError, match="centr.*Did you mean 'centre'"):
        squeeze.choose(
            {**RECIPE, "params": {}, "steps": [{"at": "projector", "ratio": 0.5, "score": "centr"}]}, grid=(2, 2)
        )
    with pytest.raises(ConfigError, match=r"powr.*power"):
        squeeze.choose(
            {**RECIPE, "params": {}, "steps": [{"at": "projector", "ratio": 0.5, "score": {"centre": {"powr": 1}}}]},
            grid=(2, 2),
        )
    with pytest.raises(ConfigError, match="'centre' is taken"):
        squeeze.register_part("centre", type("Centre", (centre,), {}))
    with pytest.raises(UnknownNameError, match=r"No part 'score\.center'"):
        squeeze.unregister_part("score", "center")
