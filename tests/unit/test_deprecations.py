"""What transformers deprecates is an error in `make newest`, whether it warns or logs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

USES = """
import warnings
import transformers


def test_warned() -> None:
    text = "`old` is deprecated and will be removed in version 6 for `f`."
    warnings.warn(text, FutureWarning, stacklevel=2)


def test_logged() -> None:
    transformers.LlamaConfig().torch_dtype


def test_neither() -> None:
    warnings.warn("this is slow", FutureWarning)
    transformers.logging.get_logger("transformers.models").warning("this is slow")
"""


def test_deprecations_are_errors_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "test_uses.py"
    path.write_text(USES)
    tests = Path(__file__).parents[1]
    words = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull, str(path)]
    told = subprocess.run(
        [*words, "--deprecations=error"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])},
        timeout=300,
    )
    assert "2 failed, 1 passed" in told.stdout, told.stdout + told.stderr
