"""The pages that are made from the code are what it renders to, and say something of all that there is."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mllm_squeeze import registry
from mllm_squeeze.parts.base import KINDS
from mllm_squeeze.recipe.recipe import load_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"


def loaded(name: str) -> Any:
    """Import a script of docs/ by its path."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> Any:
    return loaded("make_reference")


@pytest.fixture(scope="module")
def methods() -> Any:
    return loaded("make_methods")


def test_the_page_of_methods_is_what_the_recipes_render_to(methods: Any) -> None:
    assert methods.PAGE.read_text(encoding="utf-8") == methods.page(), "run python docs/make_methods.py"


def test_the_page_of_methods_has_all_of_each(methods: Any) -> None:
    for path in registry.configs_dir().glob("*.yaml"):
        recipe = load_recipe(path.stem)
        said = methods.comment(path.stem)
        assert len(said) > 80, f"{path.name}: the comment above the recipe says what it does"
        assert recipe.paper is None or "\n\nDiffers from the authors' code:" in said, path.name
        # Only what compares a method with nothing has no mechanism.
        assert recipe.mechanism is not None or recipe.paper is None, path.name


def test_the_pages_are_what_the_code_renders_to(generator: Any) -> None:
    for page, text in generator.pages().items():
        assert page.read_text(encoding="utf-8") == text, "run python docs/make_reference.py"


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_says_what_it_and_its_parameters_are(generator: Any, kind: str) -> None:
    for name in registry.part_names(kind):
        cls = registry.part_class(kind, name)
        says, parameters = generator.described(cls)
        assert says, name
        assert set(cls.model_fields) <= set(parameters), f"{kind}.{name}"


def test_every_signal_says_what_it_and_its_parameters_are(generator: Any) -> None:
    for need in generator.signal_types():
        says, parameters = generator.described(need)
        assert says
        assert {field.name for field in dataclasses.fields(need)} <= set(parameters), need


def test_the_front_page_names_every_method() -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Methods\n")[2].partition("\n## ")[0]
    missing = [path.stem for path in registry.configs_dir().glob("*.yaml") if f"`{path.stem}`" not in section]
    assert not missing
