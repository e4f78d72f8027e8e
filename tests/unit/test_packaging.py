"""The wheel: what must be in it, and that an installed copy finds its recipes there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mllm_squeeze import __version__, registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without isolation, so without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_recipes_types_and_the_model(wheel: Path) -> None:
    assert wheel.name == f"mllm_squeeze-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"mllm_squeeze/configs/{name}.yaml" for name in registry.method_names()} <= names
    assert {"mllm_squeeze/py.typed", "mllm_squeeze/cli/__init__.py"} <= names
    model = ROOT / "src" / "mllm_squeeze" / "demo" / "model"
    files = {f"mllm_squeeze/demo/model/{path.name}" for path in model.iterdir() if path.is_file()}
    assert "mllm_squeeze/demo/model/config.json" in files
    assert files <= names
    assert not [name for name in names if name.startswith(("tests/", "mllm_squeeze/tests"))]


def test_an_unpacked_wheel_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import mllm_squeeze; from mllm_squeeze import registry; from mllm_squeeze.recipe import recipe\n"
        "print(registry.configs_dir()); print(*registry.method_names()); recipe.load_recipe('fastv')"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    folder, names = done.stdout.splitlines()
    assert Path(folder) == tmp_path / "mllm_squeeze" / "configs"
    assert names.split() == registry.method_names()


def test_the_command_is_an_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"mllm_squeeze-{__version__}.dist-info/entry_points.txt").decode()
    assert "mllm-squeeze = mllm_squeeze.cli:main" in text
