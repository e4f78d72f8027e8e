"""docs/families.md is what the results render to, and no family is missing from it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import mllm_squeeze as squeeze
import tiny
from families import proof
from mllm_squeeze.family.table import TABLE
from tiny.encoded_line import ENCODED_LINE

pytestmark = pytest.mark.quick
DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = json.loads((DOCS / "results" / "families.json").read_text())


def generator() -> Any:
    """Return the module that makes the page."""
    spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_render_to() -> None:
    assert (DOCS / "families.md").read_text() == generator().render(RESULTS), "run python docs/make_families.py"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_family_is_on_the_page_with_results(name: str) -> None:
    page = (DOCS / "families.md").read_text()
    assert f"\n| {name} |" in page
    assert name in RESULTS
    if set(RESULTS[name]) == {"all"}:
        assert RESULTS[name]["all"]["refused"] in page.replace("\n", " ")
        return
    passed = {column for column, cell in RESULTS[name].items() if cell["passed"]}
    assert {"projector", "batch"} <= passed
    assert "layer" in passed or name in proof.KEYED or TABLE[name].encoded
    assert set(TABLE[name].modalities) & {"image", "video", "audio"} <= passed
    assert not any(cell["failed"] for cell in RESULTS[name].values())


def test_the_families_of_the_front_door_are_on_the_page() -> None:
    assert set(squeeze.families()) <= set(TABLE)
    assert set(squeeze.families()) <= set(RESULTS)


@pytest.mark.skipif(not proof.RECENT, reason="older releases lack types that the page names")
def test_every_type_of_the_release_has_a_line() -> None:
    """A type that came with a new release is noticed here, with the verdict of its self-check."""
    maker = generator()
    page = (DOCS / "families.md").read_text()
    missing = maker.without_a_line()
    said = "\n".join(f"{name}: {maker.verdict(name)}" for name in sorted(missing))
    assert not missing, f"python docs/make_families.py --types; a row or a reason is better:\n{said}"
    assert all(f"\n| {name} |" in page for name in maker.multimodal_types())


def test_a_type_without_a_line_is_told_with_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TABLE, "llava")
    maker = generator()
    monkeypatch.setattr(maker, "TABLE", {name: row for name, row in TABLE.items() if name != "llava"})
    assert maker.without_a_line() >= {"llava"}
    assert "a cut at layer 1 equals masking" in maker.verdict("llava")


def test_a_failed_cell_shows() -> None:
    """The page cannot hide what failed."""
    broken = {**RESULTS, "llava": {**RESULTS["llava"], "batch": {"passed": 1, "failed": 1, "refused": ""}}}
    assert "✗" in generator().render(broken)
    assert "✗" not in generator().render(RESULTS)


def test_every_tiny_model_stands_for_a_row() -> None:
    """No row without a tiny model that proves it."""
    types = {tiny.load(name).model.config.model_type for name in tiny.FAMILIES if tiny.available(name)}
    gone = {name.split("+")[0] for name in tiny.FAMILIES if not tiny.available(name)}
    assert {name.split("+")[0] for name in TABLE} <= types | gone | set(ENCODED_LINE)
