"""The comparison of methods on the model in the box."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
import oracle
from mllm_squeeze import demo
from mllm_squeeze.demo import compare, contest, kept, stopping

RESULTS = Path(__file__).parents[1] / "docs" / "results"


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
        assert 0 <= entry.exact <= entry.accuracy <= 1 and entry.seconds_low <= entry.seconds <= entry.seconds_high


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


class Scripted:
    """A model that answers every question with the same tokens, whatever it is shown."""

    def __init__(self, model: Any, processor: Any, said: str) -> None:
        self.generation_config = model.generation_config
        self.tokens = processor.tokenizer.convert_tokens_to_ids(said.split())

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        fresh = torch.tensor(self.tokens[:max_new_tokens]).expand(len(input_ids), -1)
        return torch.cat([input_ids, fresh], 1)


@pytest.mark.parametrize(
    ("said", "first", "whole", "ended"),
    [
        ("red </s>", 1, 1, 1),
        ("red </s> <pad> <pad>", 1, 1, 1),
        ("red green </s>", 1, 0, 0),
        ("red red red red red red red red red", 1, 0, 0),
        ("red <s> </s>", 1, 0, 0),
        ("green red </s>", 0, 0, 0),
        ("green </s>", 0, 0, 1),
        ("</s>", 0, 0, 0),
    ],
)
def test_a_whole_answer_is_its_word_and_nothing_else(
    boxed: tuple[Any, Any], said: str, first: float, whole: float, ended: float
) -> None:
    model, processor = boxed
    items = [item for item in demo.held_out(60) if item.answer == "red"]
    assert len(items) > 1
    contender = contest.Contender("scripted", 0.0, Scripted(model, processor, said))
    with Progress(disable=True) as bar:
        contest.measure_accuracy(bar, [contender], processor, items, 2, 1)
    found = contest.summarise(contender, contender, None, items)
    assert (found.accuracy, found.exact, found.ended) == (first, whole, ended)
    assert (found.error, found.exact_error) == (0, 0)
    assert demo.accuracy(contender.model, processor, items)["overall"] == whole


def test_answers_are_read_to_their_end(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    items = list(demo.held_out(8))
    with squeeze.applied(model, "divprune", ratio=0.75):
        said = demo.answers(model, processor, items)
    assert max(len(words.split()) for words in said) > 2


def test_what_is_said_after_a_cut_is_what_the_masked_model_says(boxed: tuple[Any, Any]) -> None:
    """That it goes on behind its word is the model's doing: with the same tokens masked it says the same."""
    model, processor = boxed
    for item in demo.held_out(4):
        text = demo.prompt(processor, item.question)
        inputs = processor(images=item.picture, text=text, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with squeeze.applied(model, "divprune", ratio=0.75) as handle:
            cut = model.generate(**inputs, **settings)
            cuts = list(handle.cuts)
        with oracle.masked(model, width, cuts, repack=True):
            masked = model.generate(**inputs, **settings)
        assert torch.equal(cut.sequences, masked.sequences)
        oracle.assert_close(torch.stack(cut.logits), torch.stack(masked.logits), item.question)


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


def test_without_times_the_answers_are_saved_alone(boxed: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = boxed
    found = compare.main(
        ("divprune",),
        (0.75,),
        questions=6,
        pictures=0,
        out=tmp_path,
        repeats=0,
        console=Console(quiet=True),
        model=model,
        processor=processor,
    )
    assert [entry.seconds for entry in found.entries] == [None, None]
    assert {path.name for path in tmp_path.iterdir()} == {"answers.json", "answers.md"}
    page = (tmp_path / "answers.md").read_text(encoding="utf-8")
    head = next(line for line in page.splitlines() if line.startswith("| method"))
    assert head.split("|")[-2].strip() == "GFLOPs" and "ms:" not in page and "median" not in page
    dense, divprune = found.entries
    assert (dense.tokens, divprune.tokens) == (196, 49)
    assert dense.exact == dense.accuracy and divprune.exact < divprune.accuracy


def test_a_method_that_refuses_a_ratio_is_named_beside_the_table(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    screen = Console(width=200, record=True, file=io.StringIO())

    def run(*methods: str) -> compare.Comparison:
        return compare.main(methods, (0.5,), 2, 0, repeats=0, console=screen, model=model, processor=processor)

    found = run("btp", "divprune")
    assert [entry.method for entry in found.entries] == ["dense", "divprune"]
    assert list(found.refused) == ["btp, 50 %"] and "step 3 keeps 0.5" in found.refused["btp, 50 %"]
    assert "\n- btp, 50 %: method 'btp'" in found.to_markdown() and "refused: btp, 50 %" in screen.export_text()
    with pytest.raises(squeeze.ConfigError, match="step 3 keeps"):
        run("btp")


def test_a_caption_shows_that_the_answer_goes_on() -> None:
    item = next(item for item in demo.held_out(50) if item.answer == "red")
    said = {"red": "red ✓", "red green": "red… ✓", "green": "green ✗", "": " ✗"}
    assert {words: compare._caption(words, item) for words in said} == said


def test_study_of_stopping_tells_the_explanations_apart(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    before = model.config._attn_implementation
    found = stopping.study(model, processor, 6, "the command")
    dense, cut, masked = found.rows[:3]
    rows = {row.what: row for row in found.rows}
    assert (dense.kept, dense.stops) == (196, 1)
    assert (cut.kept, cut.background, cut.right, cut.stops) == (49, masked.background, masked.right, masked.stops)
    assert cut.stops < 0.5 and rows["... in layer 0 only"].stops < 0.5
    assert rows["... for all before the answer word"].stops == rows["... in all layers but layer 0"].stops == 1
    assert rows["uniform, 75 % cut by the library"].stops == 1
    assert found.attention["dense"] > 0.5 > found.attention["after divprune"]
    assert model.config._attn_implementation == before
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
    assert found.to_markdown().count("\n| ") == len(found.rows) + 1


def test_drawn_tokens_hold_as_much_background_as_asked(boxed: tuple[Any, Any]) -> None:
    cases = [stopping.case(boxed[1], item) for item in demo.held_out(3)]
    for count in (10, 30):
        for one, keep in zip(cases, stopping.drawn(cases, 49, count), strict=True):
            assert len(set(keep.tolist())) == 49 and int(one.background[keep].sum()) == count


def test_study_of_what_is_kept_counts_the_background(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    found = kept.study(model, processor, ("uniform", "fastv", "nuwa"), 4)
    rows = {row.what: row for row in found.rows}
    assert [row.what for row in found.rows] == ["uniform", "fastv"] and list(found.refused) == ["nuwa"]
    assert rows["uniform"].kept == rows["fastv"].kept == 49
    share = rows["uniform"].background / 49
    assert abs(share - found.background / 196) < 0.1 and rows["fastv"].background < 0.7 * rows["uniform"].background
    assert found.to_markdown().count("\n| ") == 3 and "\n- nuwa: method 'nuwa'" in found.to_markdown()
    every = [stopping.case(processor, item) for item in demo.held_out(4)]
    assert found.background == sum(int(one.background.sum()) for one in every) / 4


def committed(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def by_method(name: str) -> dict[tuple[str, float], dict[str, Any]]:
    return {(entry["method"], entry["ratio"]): entry for entry in committed(name)["entries"]}


def test_committed_pages_are_those_of_the_committed_numbers() -> None:
    data = committed("answers")
    answers = compare.Comparison(**{**data, "entries": [contest.Entry(**entry) for entry in data["entries"]]})
    assert (RESULTS / "answers.md").read_text(encoding="utf-8") == answers.to_markdown()
    data = committed("stopping")
    study = stopping.Study(**{**data, "rows": [stopping.Row(**row) for row in data["rows"]]})
    assert (RESULTS / "stopping.md").read_text(encoding="utf-8") == study.to_markdown()
    data = committed("kept")
    found = kept.Kept(**{**data, "rows": [kept.Row(**row) for row in data["rows"]]})
    assert (RESULTS / "kept.md").read_text(encoding="utf-8") == found.to_markdown()


def test_the_table_is_whole_in_80_columns() -> None:
    """In a pipe, or on a slow machine whose times have four digits."""
    data = committed("answers")
    entries = [contest.Entry(**{**entry, "seconds": 2.468}) for entry in data["entries"]]
    screen = Console(width=80, record=True, file=io.StringIO())
    screen.print(compare._table(compare.Comparison(**{**data, "repeats": 1, "entries": entries})))
    shown = screen.export_text()
    assert "…" not in shown and shown.count(" 2468") == len(entries)


def test_both_committed_runs_heard_the_same_first_words() -> None:
    timed, answers = by_method("compare"), by_method("answers")
    # The run without times was made again when more methods had come.
    assert timed.keys() <= answers.keys()
    for key, entry in timed.items():
        # A release of torch may turn a tie: three answers of 500.
        assert entry["accuracy"] == pytest.approx(answers[key]["accuracy"], abs=0.006), key


def test_table_of_the_readme_has_the_committed_numbers() -> None:
    """First words and whole answers are from answers.json, milliseconds and FLOPs from compare.json."""
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("| | first word right") : readme.index("![Which tokens")]
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line][2:]
    timed, answers = by_method("compare"), by_method("answers")
    assert table[0][0] == "dense" and len(table) > 5
    for name, *cells in table:
        ratios = [0.0] if name == "dense" else [0.5, 0.75, 0.9]
        entries = [answers[name, ratio] for ratio in ratios]
        first = [f"{100 * entry['accuracy']:.1f} ± {100 * entry['error']:.1f}" for entry in entries]
        assert [cell.split(" (")[0] for cell in cells[:3] if cell] == first, name
        assert cells[3] == " / ".join(f"{100 * entry['exact']:.1f}" for entry in entries), name
        times = timed[name, ratios[len(ratios) // 2]]
        assert cells[4:] == [f"{1000 * times['seconds']:.0f} ms", f"{times['flops'] / 1e9:.3f} G"], name
    told = " ".join(section.split())
    for run in ("compare", "answers", "stopping"):
        assert f"`{committed(run)['command']}`" in told
    study = committed("stopping")
    shares = [row["stops"] for row in study["rows"] if row["what"] == "divprune, 75 % cut by the library"]
    for share in (*shares, *study["attention"].values()):
        assert f"{100 * share:.0f} %" in told


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
    compare.command(["--full", "--untimed"])
    (plain, named), (full, full_named), (_, untimed) = calls
    assert plain == (["fastv"], [0.5], 7, 2, None)
    assert named["command"] == "python -m mllm_squeeze.demo.compare --methods fastv --ratios 0.5 --questions 7"
    assert full == (compare.image_methods(), compare.FULL_RATIOS, 1000, 2, Path("results"))
    assert full_named["seeds"] == untimed["seeds"] == 3
    assert (named["repeats"], full_named["repeats"], untimed["repeats"]) == (5, 15, 0)
