"""The house stays one that a stranger finds his way in: small files, and a plan of it that is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mllm_squeeze

PACKAGE = Path(mllm_squeeze.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "docs" / "architecture.md"
MOST = 300
PATH = re.compile(r"[\w./]*\w(?:\.py|\.yaml|\.md|/)(?!\w)")


def too_long(folder: Path) -> dict[str, int]:
    """Return the lines of each file that has more than it may."""
    lines = {str(path.relative_to(folder)): len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert lines
    return {name: count for name, count in lines.items() if count > MOST}


def named(text: str) -> set[str]:
    """Return the files and rooms that a page names."""
    return set(PATH.findall(text)) - {"src/mllm_squeeze/", "tests/", "docs/", "configs/"}


def there(name: str) -> bool:
    return any((base / name).exists() for base in (PACKAGE, ROOT, PLAN.parent, PACKAGE / "ops"))


@pytest.mark.quick
def test_no_file_is_long() -> None:
    assert not too_long(PACKAGE)


@pytest.mark.quick
def test_a_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("\n" * MOST)
    (tmp_path / "long.py").write_text("\n" * (MOST + 1))
    assert too_long(tmp_path) == {"long.py": MOST + 1}


@pytest.mark.quick
def test_what_the_plan_names_is_there() -> None:
    names = named(PLAN.read_text())
    assert len(names) > 60
    assert not {name for name in names if not there(name)}


@pytest.mark.quick
def test_the_plan_names_every_room() -> None:
    text = PLAN.read_text()
    rooms = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} - {Path(), Path("demo/model")}
    assert not {str(room) for room in rooms if f"{room}/" not in text}


@pytest.mark.quick
def test_names_of_a_page_are_found() -> None:
    found = named("a `engine/cut.py`, (`ops/`) and configs/fastv.yaml.")
    assert found == {"engine/cut.py", "ops/", "configs/fastv.yaml"}
    assert not there("engine/nowhere.py") and there("engine/cut.py") and there("docs/recipes.md")
