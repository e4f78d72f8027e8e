"""Every example runs as its reader would run it, on the model in the box or on random weights."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mllm_squeeze import demo
from mllm_squeeze.registry import unregister_method, unregister_part

EXAMPLES = Path(__file__).parents[1] / "examples"
HELPERS = {"tiny_qwen"}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import an example as `python examples/<name>.py` would find it, with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run an example and return the lines it printed."""
    load(name, monkeypatch).main(list(arguments))
    return capsys.readouterr().out.splitlines()


def after(lines: list[str], word: str) -> str:
    """What stands behind the word that a line starts with."""
    return next(line.removeprefix(word).strip() for line in lines if line.startswith(word))


def test_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("quickstart", monkeypatch, capsys)
    assert after(lines, "removed:") == after(lines, "dense:") != ""
    assert any("196 -> 98 visual tokens, 50.0 % removed" in line for line in lines)


def test_quickstart_takes_another_picture_and_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    item = next(demo.held_out(1, seed=9))
    item.picture.save(path)
    chosen = ("--method", "uniform", "--ratio", "0.75", "--image", str(path), "--question", item.question)
    lines = run("quickstart", monkeypatch, capsys, *chosen)
    assert after(lines, "question:") == item.question
    assert any("uniform: 196 -> 49 visual tokens" in line for line in lines)


def test_requests_have_budgets_and_reports_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run("per_request", monkeypatch, capsys, "--ratios", "0.25", "0.5")
    assert "fastv: 196 -> 147 visual tokens" in after(lines, "ratio 0.25:")
    assert "fastv: 196 -> 98 visual tokens" in after(lines, "ratio 0.5:")
    assert "divprune: 196 -> 49 visual tokens" in after(lines, "ratio 0.75:")


def test_batch_rows_answer_as_they_do_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run("batch", monkeypatch, capsys)
    rows = [line for line in lines if "in the batch:" in line]
    assert len(rows) == 4
    for row in rows:
        batched, rest = row.split("in the batch:")[1].split("alone:")
        assert batched.strip() == rest.split("right:")[0].strip() != ""
    assert any("784 -> 392 visual tokens" in line for line in lines)


def test_compare_methods(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split() for line in run("compare_methods", monkeypatch, capsys)[3:]]
    assert [row[0] for row in rows] == ["random", "fastv", "visionzip", "divprune"]
    assert {row[1] for row in rows} == {"49"}
    assert len({row[-1] for row in rows}) == 1, "the dense answer must not depend on the method that is switched off"


def test_turns_hold_survivors_and_count_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run("turns", monkeypatch, capsys)
    seen, held = [], []
    for line in lines:
        if "tokens seen:" in line:
            first, second = line.split("tokens seen:")[1].split("held per layer:")
            seen.append(int(first))
            held.append({int(word) for word in second.strip(" []").split(",")})
    assert len(seen) == 3 and seen == sorted(set(seen))
    # divprune cuts before layer 0: every layer of every turn holds 98 entries less than were seen.
    assert held == [{count - 98} for count in seen]


def test_own_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("your_own_recipe", monkeypatch, capsys)
    heads = [line for line in lines if line.startswith("thin_then_rank:")]
    assert ["196 -> 49 visual tokens" in heads[0], "196 -> 20 visual tokens" in heads[1]] == [True, True]
    assert any("196 -> 118 -> 49" in line for line in lines)


def test_own_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        lines = run("your_own_part", monkeypatch, capsys)
    finally:
        unregister_method("centred")
        unregister_part("score", "centre")
    assert any(line.startswith("centred: 196 -> 49 visual tokens") for line in lines)
    assert after(lines, "kept of 8 x 8:").startswith("[") and "27" in after(lines, "kept of 8 x 8:")


def test_video(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision", reason="the video processor of transformers needs it")
    lines = run("video", monkeypatch, capsys)
    assert "random" in lines[0]
    # VidCom2 divides the budget of 36 between the frames and rounds in each.
    kept = after(lines, "vidcom2: 144 -> ").split()[0]
    assert abs(int(kept) - 36) <= 4
    assert "frames x height x width, in tokens: (4, 6, 6)" in lines


@pytest.mark.parametrize("name", ["compare_methods", "video"])
def test_examples_draw(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the extra `viz`")
    pytest.importorskip("torchvision", reason="the video processor of transformers needs it")
    path = tmp_path / "kept.png"
    run(name, monkeypatch, capsys, "--picture", str(path))
    assert path.stat().st_size > 10_000


def test_an_example_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "visual tokens" in done.stdout


def test_no_example_is_left_out() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = {path.stem for path in EXAMPLES.glob("*.py")} - HELPERS
    assert names and all(f'run("{name}"' in source for name in names)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 90
