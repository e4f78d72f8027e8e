"""The methods that ship do what their authors' own code did, and the runner says so where one does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from golden.differences import DIFFERENCES
from golden.readings import load_all
from golden.run import compared, main, verdicts

FILES = sorted(Path(__file__).parent.glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_cases(path: Path) -> None:
    found = dict(verdicts(path))
    assert found
    assert set(found.values()) == {"ok"}, found


def test_every_reading_has_its_file_and_every_difference_its_reading() -> None:
    assert {path.stem for path in FILES} == set(load_all())
    assert set(DIFFERENCES) <= set(load_all())


# A file whose first case says what is kept.
KEPT = next(path for path in FILES if path.stem == "fastv")


def altered(path: Path, **changes: np.ndarray) -> None:
    with np.load(KEPT) as stored:
        np.savez(path, **{**{name: stored[name] for name in stored.files}, **changes})


def test_another_expectation_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / KEPT.name
    with np.load(KEPT) as stored:
        kept = stored["c0_keep"]
    altered(path, c0_keep=np.arange(len(kept)))
    assert main([str(path)]) == 1
    assert f"{path.stem} c0 differs: keep differs in" in capsys.readouterr().out


def test_an_unknown_method_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nobody.npz"
    altered(path)
    assert main([str(path)]) == 1
    assert "nobody c0 missing: no such method" in capsys.readouterr().out


def test_every_case_of_a_file_runs(tmp_path: Path) -> None:
    path = tmp_path / FILES[0].name
    with np.load(FILES[0]) as stored:
        first = {name: stored[name] for name in stored.files}
    second = {f"c1{name[2:]}": value for name, value in first.items() if name.startswith("c0_")}
    np.savez(path, **first, **second)
    assert list(verdicts(path)) == [("c0", "ok"), ("c1", "ok")]


def test_a_number_that_is_off_differs() -> None:
    from golden.case import Case

    case = Case({"scores": np.array([1.0, 2.0])})
    assert list(compared({"scores": np.array([1.0, 2.0])}, case)) == []
    assert list(compared({"scores": np.array([1.0, 2.1])}, case)) == ["scores is off by 1.0e-01"]
    assert list(compared({"scores": np.array([1.0])}, case)) == ["scores has shape [1], expected [2]"]


def test_it_runs_as_a_script() -> None:
    script = Path(__file__).parent / "run.py"
    done = subprocess.run([sys.executable, script, FILES[0]], capture_output=True, text=True, check=False)
    assert done.stdout == f"{FILES[0].stem} c0 ok\n", done.stderr
    assert done.returncode == 0
