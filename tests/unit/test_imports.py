"""Dependencies point one way, and what only looks at recipes does not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mllm_squeeze

PACKAGE = Path(mllm_squeeze.__file__).parent
NAME = "mllm_squeeze"

# folder: what of the package a file in it may import (its own folder aside).
ALLOWED = {
    "ops": set(),
    "reducers": {"ops", "reducers.base", "reducers.needs", "parts", "errors", "layout"},
    "parts": {"ops", "reducers.base", "reducers.needs", "registry.build_part", "errors", "layout"},
    "upstream": {"errors"},
    "family": {"layout", "errors", "upstream"},
    # The parts of a model are found by the families' structural adapter; the engine knows no family by name (`table`).
    "engine": {"amount", "layout", "ops", "reducers.base", "reducers.needs", "errors", "family", "upstream"},
}
OWN_FOLDER = {"ops", "parts", "upstream", "family", "engine"}
FORBIDDEN = {"engine": {"family.table"}}

# room of the engine: what of the engine it may import (itself aside), the lowest floor first. What hangs on a module is
# in `hooks`, and nothing else knows of hooks.
ROOMS: dict[str, set[str]] = {
    "timing": set(),
    "text_encoder": set(),
    "plan": {"text_encoder"},
    "trace": {"plan"},
    "tokens": {"timing", "text_encoder", "plan"},
    "kv": set(),
    "sequence": {"timing", "plan", "trace", "tokens", "kv"},
    "signals": {"timing", "text_encoder", "plan", "tokens", "sequence"},
    "limits": {"plan", "sequence"},
    "cut": {"timing", "plan", "trace", "tokens", "sequence", "signals", "limits"},
    "encoder": {"timing", "text_encoder", "tokens", "signals"},
    "decode": {"kv", "sequence", "signals"},
    "keys": {"timing", "plan", "sequence", "cut"},
    "hooks": {"plan", "trace", "tokens", "kv", "sequence", "signals", "cut", "encoder", "decode", "keys"},
}


def imported(path: Path) -> set[str]:
    """Return what a file imports of the package, relative to the package, imports for type checking included."""
    package = [NAME, *path.relative_to(PACKAGE).parent.parts]
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            out |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{NAME}.") for name in out if name.startswith(f"{NAME}.")}


def permitted(name: str, allowed: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in allowed)


@pytest.mark.parametrize("folder", ALLOWED)
def test_dependencies_point_one_way(folder):
    allowed = ALLOWED[folder] | ({folder} if folder in OWN_FOLDER else set())
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files, folder
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files
        for name in imported(path)
        if not permitted(name, allowed) or permitted(name, FORBIDDEN.get(folder, set()))
    }
    assert not wrong


def room_of(name: str) -> str | None:
    """Return the room of the engine that an imported name belongs to, None for what is outside of the engine."""
    first, _, rest = name.partition(".")
    return rest.split(".")[0] if first == "engine" else None


def test_every_room_of_the_engine_is_on_a_floor():
    there = {path.stem for path in (PACKAGE / "engine").iterdir() if path.name[0] not in "_."}
    assert there == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_engine_import_what_is_below(room):
    floors = list(ROOMS)
    assert all(floors.index(below) < floors.index(room) for below in ROOMS[room])
    folder = PACKAGE / "engine" / room
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    used = {room_of(name) for path in files for name in imported(path)} - {None, room}
    assert not used - ROOMS[room]


def test_only_errors_and_types_stand_below_everything():
    assert imported(PACKAGE / "errors.py") == set()
    assert imported(PACKAGE / "layout.py") <= {"errors"}
    assert imported(PACKAGE / "amount.py") == {"ops", "errors.ConfigError"}
    for path in (PACKAGE / "reducers" / "needs").glob("*.py"):
        assert all(name.startswith("reducers.needs") for name in imported(path))
    below = ("layout.", "errors.", "reducers.needs.", "ops")
    assert all(name.startswith(below) for name in imported(PACKAGE / "reducers" / "base.py"))


def test_reducers_and_recipes_load_without_torch():
    modules = [NAME, f"{NAME}.ops", f"{NAME}.recipe.recipe", f"{NAME}.registry", f"{NAME}.ops.budget", f"{NAME}.amount"]
    modules += [f"{NAME}.reducers.{p.stem}" for p in (PACKAGE / "reducers").glob("*.py") if p.stem != "__init__"]
    code = (
        f"import sys, importlib\n[importlib.import_module(m) for m in {modules}]\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def defined(path: Path) -> set[str]:
    """Return the public functions and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, kinds) and not n.name.startswith("_")}


def test_ops_names_are_lazy_and_complete():
    """Every public function of a module of ops is found under `ops`, and nothing else is."""
    from mllm_squeeze import ops

    modules = [path for path in (PACKAGE / "ops").glob("*.py") if path.stem != "__init__"]
    assert set(ops.__all__) == set().union(*map(defined, modules)) == set(dir(ops))
    for name in ops.__all__:
        assert getattr(ops, name).__name__ == name
        assert getattr(ops, name).__doc__
    with pytest.raises(AttributeError, match="no_such_op"):
        ops.no_such_op  # noqa: B018
