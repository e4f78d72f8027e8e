"""docs/parts.md and docs/signals.md are what the code renders to, and say something of every parameter."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mllm_squeeze import registry
from mllm_squeeze.parts.base import KINDS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
