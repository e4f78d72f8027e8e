"""What an error recommends is worked out for the model at hand; no place of the engine knows a method by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import mllm_squeeze as squeeze
import tiny
from mllm_squeeze import registry
from mllm_squeeze.errors import ConfigError, SqueezeError, UnsupportedModelError
from mllm_squeeze.family.table import TABLE
from mllm_squeeze.planning.closest import closest_methods
from mllm_squeeze.recipe.recipe import facts, load_recipe
from mllm_squeeze.upstream.attention_tap import Tap

PACKAGE = Path(squeeze.__file__).parent
# Rooms that know no method and no family by name.
NAMELESS = ("engine", "ops", "planning", "upstream", "parts")
# The record of what was tried is made from the source of each family: a list of folders of transformers.
FOLDERS = {Path("upstream/symbols.py")}
CLOSEST = "the closest first: "


def named(error: BaseException) -> list[str]:
    """Return the methods that an error recommends."""
    text = str(error)
    assert CLOSEST in text, text
    return text.rpartition(CLOSEST)[2].rstrip(".").split(", ")


IN_FRONT = {"projector", "layer 0"}
# family, method and parameters that do not fit it, where the recommended act, one that fits but is less alike.
REFUSED: dict[str, tuple[str, str, dict[str, Any], set[str], str]] = {
    "no encoder attention": ("qwen2_audio", "visionzip", {}, IN_FRONT, "fastv"),
    "no encoder to merge in": ("qwen2_5_vl", "tome", {}, IN_FRONT | {"layer 3"}, "fastv"),
    "no video": ("llava", "vidcom2", {}, IN_FRONT, "fastv"),
    "no layer before": ("llava", "fastv", {"layer": 0}, IN_FRONT, "sparsevlm"),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", REFUSED)
def test_methods_that_fit_are_recommended(case: str) -> None:
    family, method, params, places, wrong = REFUSED[case]
    t = tiny.load(family)
    with pytest.raises((ConfigError, UnsupportedModelError)) as caught:
        squeeze.apply(t.model, method, **params)
    names = named(caught.value)
    assert len(names) == 3
    assert wrong not in names and method not in names
    for name in names:
        assert set(facts(load_recipe(name))["places"]) <= places
        with squeeze.applied(t.model, name):
            pass


def test_what_cannot_be_read_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap refuses a module that the plan took for attention; the error is completed where it leaves `apply`."""

    def refuse(self: Tap, *args: Any) -> None:
        raise UnsupportedModelError("This attention cannot be read.", avoid=["attention"])

    monkeypatch.setattr(Tap, "__init__", refuse)
    with pytest.raises(UnsupportedModelError, match=r"^This attention cannot be read\. ") as caught:
        squeeze.apply(tiny.load("llava").model, "fastv")
    for name in named(caught.value):
        assert set(facts(load_recipe(name))["signals"]) <= {"Features", "Normed", "Size"}


def test_like_comes_first() -> None:
    """For a method in front of the LLM others there, for one inside the LLM others inside."""
    parts = squeeze.api._find(tiny.load("llava").model)
    before = closest_methods(load_recipe("divprune"), parts)
    inside = closest_methods(load_recipe("fastv"), parts)
    first = {name: facts(load_recipe(name))["places"][0] for name in (*before, *inside)}
    assert all(first[name] in ("projector", "layer 0") for name in before)
    assert all(first[name].startswith("layer") and first[name] != "layer 0" for name in inside)


def test_an_error_that_another_method_does_not_heal_recommends_none() -> None:
    with pytest.raises(SqueezeError) as caught:
        squeeze.apply(tiny.load("llava").model, "fastv", layer=99)
    assert CLOSEST not in str(caught.value)


def test_nothing_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_squeeze.planning.closest.method_names", lambda: ["fastv", "no such method"])
    with pytest.raises(SqueezeError, match=r"No other method that is known here fits this model; squeeze\.check"):
        squeeze.apply(tiny.load("llava").model, "fastv", layer=0)


def names_in(text: str, names: set[str]) -> set[str]:
    """Return which names are words of a file's strings and identifiers; docstrings and comments may tell of them."""
    tree = ast.parse(text)
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            out |= names & set(re.findall(r"[\w-]+", node.value))
        for field in ("id", "attr", "arg", "name"):
            out |= names & {getattr(node, field, None)}
    return out


@pytest.mark.quick
def test_no_method_and_no_family_is_named_where_all_are_served() -> None:
    files = [path.relative_to(PACKAGE) for room in NAMELESS for path in sorted((PACKAGE / room).rglob("*.py"))]
    assert len(files) > 60
    methods, families = set(registry._builtin_methods()), set(TABLE)
    wrong = {
        str(path): names_in((PACKAGE / path).read_text(), methods if path in FOLDERS else methods | families)
        for path in files
    }
    assert not {path: found for path, found in wrong.items() if found}


@pytest.mark.quick
def test_the_scan_finds_names() -> None:
    text = "def f(dart):\n    '''Of fastv.'''\n    return x.tome(divprune=1), f'{f} (visionzip, uniform)', 'qwen3_vl'\n"
    found = names_in(text, {*registry._builtin_methods(), *TABLE})
    assert found == {"dart", "tome", "divprune", "visionzip", "uniform", "qwen3_vl"}
