"""The comparison of methods on the model in the box."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo
from mllm_squeeze.demo import compare, contest


@pytest.fixture(scope="module")
def boxed() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(demo.folder()).eval()
    return model, AutoProcessor.from_pretrained(demo.folder())


@pytest.fixture(scope="module")
def result(boxed: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[compare.Comparison, Path, str]:
    """One small comparison with its files and its printed table."""
    pytest.importorskip("matplotlib", reason="drawing needs the extra `viz`")
    out = tmp_path_factory.mktemp("compare")
    console = Console(record=True, width=140, quiet=False, file=(out / "screen.txt").open("w", encoding="utf-8"))
    model, processor = boxed
    found = compare.main(
        ("random", "fastv"),
        (0.5, 0.9),
        questions=12,
        pictures=1,
        out=out,
        seeds=2,
        repeats=2,
        batch=6,
        console=console,
        command="the command",
        model=model,
        processor=processor,
    )
    return found, out, console.export_text()


def test_the_model_needs_the_picture(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    items = list(demo.held_out(60))
    swapped = [demo.Item(**{**vars(item), "picture": items[i - 1].picture}) for i, item in enumerate(items)]
    seen, blind = (demo.accuracy(model, processor, these)["overall"] for these in (items, swapped))
    assert blind < seen - 0.25


def test_comparison_has_dense_and_each_method_at_each_ratio(result: tuple[compare.Comparison, Path, str]) -> None:
    found, _, _ = result
    assert [(entry.method, entry.ratio) for entry in found.entries] == [
        ("dense", 0.0),
        ("random", 0.5),
        ("fastv", 0.5),
        ("random", 0.9),
        ("fastv", 0.9),
    ]
    dense, _, fastv, _, _ = found.entries
    assert [entry.tokens for entry in found.entries] == [196, 98, 98, 20, 20]
    assert dense.flops is not None and fastv.flops is not None and fastv.flops < dense.flops
    assert 98 < fastv.tokens_per_layer < 196
    assert [entry.seeds for entry in found.entries] == [1, 2, 1, 2, 1]
    for entry in found.entries:
        assert 0 <= entry.accuracy <= 1 and entry.seconds_low <= entry.seconds <= entry.seconds_high


def test_comparison_agrees_with_the_answers(
    result: tuple[compare.Comparison, Path, str], boxed: tuple[Any, Any]
) -> None:
    found, _, _ = result
    model, processor = boxed
    items = list(demo.held_out(12))

    def share() -> float:
        said = demo.answers(model, processor, items)
        return sum(words.split()[:1] == [item.answer] for words, item in zip(said, items, strict=True)) / len(items)

    assert found.entries[0].accuracy == pytest.approx(share())
    with squeeze.applied(model, "fastv", ratio=0.9):
        assert found.entries[4].accuracy == pytest.approx(share())


@pytest.mark.parametrize(("said", "right"), [("red", True), ("red green", True), ("green red", False), ("", False)])
def test_the_first_word_counts(said: str, right: bool) -> None:
    item = next(item for item in demo.held_out(50) if item.answer == "red")
    assert contest.hit(said, item) is right


def test_comparison_leaves_the_model_alone(
    result: tuple[compare.Comparison, Path, str], boxed: tuple[Any, Any]
) -> None:
    model, _ = boxed
    with pytest.raises(squeeze.SqueezeError):
        squeeze.remove(model)


def test_comparison_writes_what_it_printed(result: tuple[compare.Comparison, Path, str]) -> None:
    found, out, screen = result
    data = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert data["command"] == "the command"
    assert {"torch", "transformers", "mllm_squeeze", "python"} <= set(data["versions"])
    assert len(data["entries"]) == len(found.entries)
    page = (out / "compare.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in page if line.startswith("|")]
    assert len(rows) == len(found.entries) + 2
    assert len({row.count("|") for row in rows}) == 1
    assert (out / "compare.png").stat().st_size > 20_000
    for entry in found.entries:
        assert f"{100 * entry.accuracy:.1f} ±" in screen


def test_error_is_that_of_the_mean() -> None:
    # Three of four right: deviation sqrt(3 * 0.25^2 + 0.75^2) / sqrt(3) = 0.5, over sqrt(4) questions.
    assert contest.mean_and_error([1, 1, 1, 0]) == (0.75, pytest.approx(0.25))
    assert contest.mean_and_error([1.0]) == (1.0, 0.0)
    assert contest.mean_rows([[1, 0, 1], [1, 1, 0]]) == [1, 0.5, 0.5]


def test_comparison_of_nothing_is_the_dense_model(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    console = Console(quiet=True)
    found = compare.main((), (), questions=3, repeats=2, console=console, model=model, processor=processor)
    assert [entry.method for entry in found.entries] == ["dense"]
    assert math.isnan(found.entries[0].tokens) and found.entries[0].flops is None


def test_image_methods_leave_out_videos_and_caches() -> None:
    names = compare.image_methods()
    assert {"random", "uniform", "fastv", "sparsevlm", "visionzip", "divprune", "tome"} <= set(names)
    assert set(names) <= set(squeeze.methods())
    for name in names:
        assert "image" in squeeze.describe(name)["facts"]["modalities"]


def test_command_line_reaches_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(compare, "main", lambda *args, **kwargs: calls.append((args, kwargs)))
    compare.command(["--methods", "fastv", "--ratios", "0.5", "--questions", "7"])
    compare.command(["--full", "--out", "results"])
    (plain, named), (full, full_named) = calls
    assert plain == (["fastv"], [0.5], 7, 2, None)
    assert named["command"] == "python -m mllm_squeeze.demo.compare --methods fastv --ratios 0.5 --questions 7"
    assert full == (compare.image_methods(), compare.FULL_RATIOS, 1000, 2, Path("results"))
    assert full_named["seeds"] == 3
