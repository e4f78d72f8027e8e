"""Methods side by side on the model in the box: accuracy, time, FLOPs, and pictures of what each one keeps.

`python -m mllm_squeeze.demo.compare` takes about a minute on two cores; `--full --out docs/results` makes the committed
tables from all methods that prune images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import viz
from mllm_squeeze.report import Report

from . import folder
from .evaluate import answers, prompt
from .questions import Item, held_out

METHODS = ("random", "fastv", "sparsevlm", "visionzip", "divprune", "tome")
RATIOS = (0.5, 0.75, 0.9)
DENSE = "dense"
HEAD = ("method", "removed", "tokens", "per layer", "accuracy %", "to dense", "prefill ms", "GFLOPs")


@dataclass(frozen=True)
class Entry:
    """One method at one budget.

    tokens: visual tokens per picture left in the end. tokens_per_layer: their mean over the decoder layers. accuracy,
    error: share of right answers and its standard error. against_dense, against_dense_error: the paired difference in
    accuracy. seconds: medians of the timed prefills of one batch, vision encoder included; seconds_low and seconds_high
    are the quartiles. flops: of the language model's prefill, for one prompt.
    """

    method: str
    ratio: float
    tokens: float
    tokens_per_layer: float
    accuracy: float
    error: float
    against_dense: float
    against_dense_error: float
    by_kind: dict[str, float]
    flops: float | None
    seconds: float
    seconds_low: float
    seconds_high: float
    seeds: int


@dataclass
class Contender:
    """A copy of the model with one method on it, and what has been seen of it so far."""

    method: str
    ratio: float
    model: Any
    handle: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    right: list[list[float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """All that one run found, and what it was run with."""

    entries: list[Entry]
    questions: int
    batch: int
    repeats: int
    versions: dict[str, str]
    threads: int
    command: str

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the table for the documentation."""
        lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' + ' ---: |' * (len(HEAD) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in map(_cells, self.entries)]
        facts = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            "\n".join(lines)
            + f"\n\n{self.questions} held-out questions, one picture each. Errors are standard errors; the difference"
            + f" to dense is paired. Prefill: median of {self.repeats} runs of a batch of {self.batch}, all methods in"
            + f" turn in one process, {self.threads} CPU threads, vision encoder included; FLOPs: language model only,"
            + f" one prompt.\n\n`{self.command}`, {facts}\n"
        )


def image_methods() -> list[str]:
    """Return the methods that prune a picture during the prefill, to a ratio that the caller chooses."""
    out = []
    for name in squeeze.methods():
        told = squeeze.describe(name)
        facts = told["facts"]
        in_cache = any(place.startswith("cache") for place in facts["places"])
        if "image" in facts["modalities"] and "ratio" in told["params"] and not in_cache:
            out.append(name)
    return out


def main(
    methods: Sequence[str] = METHODS,
    ratios: Sequence[float] = RATIOS,
    questions: int = 100,
    pictures: int = 2,
    out: str | Path | None = None,
    *,
    seeds: int = 1,
    repeats: int = 7,
    batch: int = 20,
    console: Console | None = None,
    command: str = "mllm_squeeze.demo.compare.main()",
    model: Any = None,
    processor: Any = None,
) -> Comparison:
    """Evaluate the dense model and each method at each ratio on the same held-out questions, print and save the table.

    pictures: how many pictures of survivors to draw. out: folder for compare.json, compare.md and compare.png; nothing
    is written without it. seeds: seeds of a random method, averaged. repeats: timed prefills. model, processor: instead
    of the model in the box.
    """
    console = console or Console()
    if model is None:
        model = AutoModelForImageTextToText.from_pretrained(folder()).eval()
        processor = AutoProcessor.from_pretrained(folder())
    items = list(held_out(questions))
    contenders = _line_up(model, methods, ratios)
    with _progress(console) as bar:
        _measure_accuracy(bar, contenders, processor, items, batch, seeds)
        _measure_time(bar, contenders, _inputs(processor, items[:batch]), repeats)
    dense = contenders[0]
    reference = contenders[1].handle.report() if len(contenders) > 1 else None
    comparison = Comparison(
        entries=[_entry(contender, dense, reference, items) for contender in contenders],
        questions=len(items),
        batch=min(batch, len(items)),
        repeats=repeats,
        versions=_versions(),
        threads=torch.get_num_threads(),
        command=command,
    )
    console.print(_table(comparison))
    if out is not None:
        _save(comparison, Path(out), console)
        _draw(contenders, processor, _examples(dense, items, pictures), Path(out) / "compare.png")
    return comparison


def _line_up(model: Any, methods: Sequence[str], ratios: Sequence[float]) -> list[Contender]:
    """The dense model and a squeezed copy for each method and ratio, so that all of them can be timed in turn."""
    out = [Contender(DENSE, 0.0, model)]
    for ratio in ratios:
        for method in methods:
            twin = copy.deepcopy(model)
            out.append(Contender(method, ratio, twin, squeeze.apply(twin, method, ratio=ratio), {"ratio": ratio}))
    return out


def _measure_accuracy(
    bar: Progress, contenders: list[Contender], processor: Any, items: list[Item], batch: int, seeds: int
) -> None:
    task = bar.add_task("answers", total=sum(_seeds_of(c, seeds) for c in contenders))
    for contender in contenders:
        for seed in range(_seeds_of(contender, seeds)):
            if seed:
                contender.handle.remove()
                contender.handle = squeeze.apply(contender.model, contender.method, **contender.params, seed=seed)
            given = answers(contender.model, processor, items, batch)
            contender.right.append([float(said == item.answer) for said, item in zip(given, items, strict=True)])
            bar.update(task, advance=1, description=f"answers: {contender.method}")
    bar.update(task, description="answers")


def _seeds_of(contender: Contender, seeds: int) -> int:
    """How many seeds to average: one for a method without chance in it."""
    return seeds if contender.handle is not None and "seed" in contender.handle.recipe.params else 1


def _inputs(processor: Any, items: Sequence[Item]) -> Any:
    texts = [prompt(processor, item.question) for item in items]
    return processor(images=[item.picture for item in items], text=texts, padding=True, return_tensors="pt")


def _measure_time(bar: Progress, contenders: list[Contender], inputs: Any, repeats: int) -> None:
    """Time a prefill of each contender in turn, so that a slow spell of the machine hits all of them alike."""
    task = bar.add_task("prefill", total=(repeats + 1) * len(contenders))
    for turn in range(repeats + 1):
        for contender in contenders:
            begin = time.perf_counter()
            with torch.no_grad():
                contender.model(**inputs, use_cache=True, logits_to_keep=1)
            if turn:  # the first one warms up
                contender.times.append(time.perf_counter() - begin)
            bar.update(task, advance=1)


def _entry(contender: Contender, dense: Contender, reference: Report | None, items: list[Item]) -> Entry:
    right, base = _mean_rows(contender.right), _mean_rows(dense.right)
    accuracy, error = _mean_and_error(right)
    difference, difference_error = _mean_and_error([a - b for a, b in zip(right, base, strict=True)])
    low, middle, high = statistics.quantiles(contender.times, n=4)
    tokens, per_layer, flops = _sizes(contender, reference)
    by_kind = {
        kind: statistics.fmean(hit for hit, item in zip(right, items, strict=True) if item.kind == kind)
        for kind in sorted({item.kind for item in items})
    }
    return Entry(
        method=contender.method,
        ratio=contender.ratio,
        tokens=tokens,
        tokens_per_layer=per_layer,
        accuracy=accuracy,
        error=error,
        against_dense=difference,
        against_dense_error=difference_error,
        by_kind=by_kind,
        flops=flops,
        seconds=middle,
        seconds_low=low,
        seconds_high=high,
        seeds=len(contender.right),
    )


def _sizes(contender: Contender, reference: Report | None) -> tuple[float, float, float | None]:
    """Visual tokens in the end, visual tokens per layer and FLOPs, of one prompt; dense ones from any other's report."""
    if contender.handle is not None:
        report = contender.handle.report()
        n = report.record.batch
        return report.visual_after / n, report.mean_visual / n, None if report.flops is None else report.flops / n
    if reference is None:
        return math.nan, math.nan, None
    n = reference.record.batch
    flops = None if reference.flops_dense is None else reference.flops_dense / n
    return reference.visual_before / n, reference.visual_before / n, flops


def _mean_rows(rows: list[list[float]]) -> list[float]:
    """Mean over the seeds, for each question."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over the questions."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / math.sqrt(len(values))


def _cells(entry: Entry) -> list[str]:
    """One row of the table, as words."""
    dense = entry.method == DENSE
    difference = f"{100 * entry.against_dense:+.1f} ± {100 * entry.against_dense_error:.1f}"
    return [
        entry.method,
        "-" if dense else f"{100 * entry.ratio:.0f} %",
        f"{entry.tokens:.0f}",
        f"{entry.tokens_per_layer:.0f}",
        f"{100 * entry.accuracy:.1f} ± {100 * entry.error:.1f}",
        "-" if dense else difference,
        f"{1000 * entry.seconds:.0f} ({1000 * entry.seconds_low:.0f}-{1000 * entry.seconds_high:.0f})",
        "-" if entry.flops is None else f"{entry.flops / 1e9:.3f}",
    ]


def _table(comparison: Comparison) -> Table:
    title = f"{comparison.questions} held-out questions, prefill in batches of {comparison.batch}"
    table = Table(title=title, caption="± standard error; prefill: median (quartiles) of turns, encoder included")
    for i, name in enumerate(HEAD):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    last = 0.0
    for entry in comparison.entries:
        if entry.ratio != last:
            table.add_section()
        last = entry.ratio
        table.add_row(*_cells(entry))
    return table


def _save(comparison: Comparison, out: Path, console: Console) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(comparison.to_json(), encoding="utf-8")
    (out / "compare.md").write_text(comparison.to_markdown(), encoding="utf-8")
    console.print(f"written: compare.json, compare.md and compare.png in {out}")


def _examples(dense: Contender, items: list[Item], count: int) -> list[Item]:
    """The first questions that the dense model answers rightly, so that every mistake shown is the method's."""
    known = [item for item, hit in zip(items, dense.right[0], strict=True) if hit]
    return (known or items)[:count]


def _draw(contenders: list[Contender], processor: Any, items: list[Item], path: Path) -> None:
    """Draw what each method keeps at the middle ratio, a row for each item, with the answer under each picture."""
    ratios = sorted({c.ratio for c in contenders if c.handle is not None})
    if not ratios or not items:
        return
    shown = [c for c in contenders if c.handle is not None and c.ratio == ratios[len(ratios) // 2]]
    kept: list[list[list[int]]] = []
    captions = []
    for item in items:
        said = [answers(c.model, processor, [item])[0] for c in [contenders[0], *shown]]
        captions.append([f"{word} {'✓' if word == item.answer else '✗'}" for word in said])
        kept.append([viz.survivors(c.handle.layout.spans[0], c.handle.cuts[-1]) for c in shown])
    titles = [f"{c.method}\n{len(kept[0][i])} kept" for i, c in enumerate(shown)]
    rows = ["\n".join(textwrap.wrap(item.question, 20)) for item in items]
    tiles = shown[0].handle.layout.spans[0].tiles
    viz.sheet([i.picture for i in items], tiles, kept, titles=titles, rows=rows, captions=captions, path=path)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "mllm_squeeze": squeeze.__version__,
    }


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def command(arguments: Sequence[str] | None = None) -> Comparison:
    """Read the command line and run `main`."""
    parser = argparse.ArgumentParser(prog="python -m mllm_squeeze.demo.compare", description=__doc__)
    parser.add_argument("--methods", nargs="+", help=f"default: {' '.join(METHODS)}; with --full all that prune images")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="fractions of the tokens removed")
    parser.add_argument("--questions", type=int, help="default: 100, with --full 1000")
    parser.add_argument("--pictures", type=int, default=2, help="pictures of survivors to draw")
    parser.add_argument("--out", type=Path, help="folder for the JSON, the table and the picture")
    parser.add_argument("--full", action="store_true", help="all methods, more questions, three seeds of chance")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    return main(
        options.methods or (image_methods() if options.full else METHODS),
        options.ratios,
        options.questions or (1000 if options.full else 100),
        options.pictures,
        options.out,
        seeds=3 if options.full else 1,
        repeats=15 if options.full else 7,
        command=shlex.join([*parser.prog.split(), *given]),
    )


if __name__ == "__main__":
    command()
